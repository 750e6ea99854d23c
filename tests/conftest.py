"""What the tests share: a small real corpus, one cache for all of them, and the command itself."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT_FILES = (
    "abc",
    "ast",
    "bdb",
    "cmd",
    "code",
    "copy",
    "csv",
    "dis",
    "enum",
    "glob",
    "hmac",
    "io",
)

LONGEST = (
    "test_slurm.py",
    "test_train.py",
    "test_offload.py",
    "test_faults.py",
    "test_adapters.py",
    "test_distill.py",
    "test_sweep.py",
    "test_run.py",
    "test_extending.py",
    "test_supervision.py",
    "test_divergence.py",
    "test_full_disk.py",
)

# A Llama that takes a step in milliseconds.
SMALL = [
    "model.config.vocab_size=512",
    "model.config.hidden_size=64",
    "model.config.head_dim=32",
    "model.config.num_hidden_layers=2",
    "train.seq_len=32",
    "train.global_batch=4",
]


# In the background of a shell Ctrl+C is ignored, also by all that is started from there.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Give each worker cores of its own: threads that wait for another's core spin 2/3 away.

    With more workers than cores, some of which always wait for something, several share a core.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        number = int(worker.removeprefix("gw")) % len(cores)
        os.sched_setaffinity(0, cores[number :: min(workers, len(cores))])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that none of them ends alone."""
    names = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: names.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, so that a model is counted and a corpus tokenised once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve modules of the standard library as text."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in TEXT_FILES:
        source = Path(sysconfig.get_paths()["stdlib"], f"{name}.py")
        shutil.copy(source, folder / f"{name}.txt")
    return folder


@dataclass
class Command:
    """A command of ours with its own folder for outputs."""

    cache: Path
    corpus: Path
    folder: Path

    def words(self, module: str, *overrides: str) -> list[str]:
        text = ["data=text", f"data.path={self.corpus}", "data.held_out_every=4"]
        brings_data = any(word.startswith("data=") for word in overrides)
        return [
            sys.executable,
            "-m",
            f"llmtrain.{module}",
            f"output_root={self.folder / 'outputs'}",
            f"cache_root={self.cache}",
            *([] if brings_data else text),
            *overrides,
        ]

    def run(self, *overrides: str, module: str = "run") -> "subprocess.CompletedProcess[str]":
        """Run it to its end."""
        return subprocess.run(
            self.words(module, *overrides),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=self.folder,
            env=self.environment,
        )

    def start(self, *overrides: str) -> "subprocess.Popen[str]":
        """Start it, in a session of its own."""
        return subprocess.Popen(
            self.words("run", *overrides),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
        )

    @property
    def environment(self) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
        return plain | {"PYTHONPATH": str(ROOT)}

    def only_run(self) -> Path:
        """The one run folder that there is."""
        (folder,) = self.runs()
        return folder

    def runs(self) -> list[Path]:
        """The folders of runs, and not those of sweeps."""
        outputs = self.folder / "outputs"
        found = sorted(outputs.iterdir()) if outputs.exists() else []
        return [path for path in found if not (path / "sweep.json").exists()]


@pytest.fixture
def command(cache: Path, corpus: Path, tmp_path: Path) -> Iterator[Command]:
    """The command line, with ranks that a failed test left behind ended."""
    started = Command(cache, corpus, tmp_path)
    yield started
    for pid in ranks_below(tmp_path):
        os.kill(pid, signal.SIGKILL)


def ranks_below(folder: Path) -> list[int]:
    """The rank processes that train a run below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"llmtrain.train" in words and any(str(folder).encode() in word for word in words):
            found.append(int(path.parent.name))
    return sorted(found)


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for something to become true; fail the test if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A disk in memory. The test is skipped where this user may not mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs: run the tests as root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB."""
    with mounted(tmp_path / "small", "3m") as place:
        yield place


@pytest.fixture
def large_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB: room for a small run."""
    with mounted(tmp_path / "large", "64m") as place:
        yield place
