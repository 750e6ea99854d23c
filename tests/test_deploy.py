"""What is installed without the checkout, and the files that start a run somewhere else."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.conftest import ROOT, wait_until

DEPLOY = ROOT / "deploy"
PACKAGES = ("conf", "hydra_plugins", "launchers", "llmtrain")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(folder), str(source)], check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_a_wheel_carries_every_file_of_every_package(wheel: Path) -> None:
    carried = set(ZipFile(wheel).namelist())
    for name in PACKAGES:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in carried
    tops = {name.partition("/")[0] for name in carried}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    text = next(name for name in carried if name.endswith("entry_points.txt"))
    assert "llmtrain = llmtrain.__main__:main" in ZipFile(wheel).read(text).decode()


def test_an_installed_wheel_composes_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    ZipFile(wheel).extractall(site)
    words = [sys.executable, "-m", "llmtrain", "run", "--cfg", "job", "experiment=quickstart"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    said = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert said.returncode == 0, said.stderr
    assert "name: llama_tiny" in said.stdout


@pytest.mark.parametrize("name", ["tmux.sh", "job.sbatch"])
def test_shell_files_can_be_read_by_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / name)], check=True)


def test_a_docker_build_finds_each_file_that_it_copies() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text()
    sources = [
        path for line in re.findall(r"^COPY (.+)$", text, re.M) for path in line.split()[:-1]
    ]
    assert len(sources) > 6
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}\n" in kept


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    python = tmp_path / "llmtrain" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    unit = tmp_path / "llmtrain@tiny.service"
    shutil.copy(DEPLOY / "llmtrain@.service", unit)
    environment = os.environ | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    verify = ["systemd-analyze", "--user", "--man=no", "verify", str(unit)]
    said = subprocess.run(verify, capture_output=True, text=True, env=environment, check=False)
    assert said.returncode == 0, said.stderr
    assert "llmtrain@" not in said.stderr


def test_the_unit_restarts_what_was_stopped_and_not_what_was_refused() -> None:
    text = (DEPLOY / "llmtrain@.service").read_text()
    assert "RestartForceExitStatus=75\n" in text
    assert "RestartPreventExitStatus=2\n" in text
    assert "Restart=on-abnormal\n" in text  # a signal, and no exit code


FAKE = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
exit $(sed -n "$(wc -l < "$CALLS")p" "$CODES")
"""


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not here")
def test_the_tmux_script_continues_a_stopped_run_and_ends_with_a_refused_one(
    tmp_path: Path,
) -> None:
    """It looks at the exit code of its command and nothing else, so any command will do."""
    command = tmp_path / "llmtrain"
    command.write_text(FAKE)
    command.chmod(0o755)
    (tmp_path / "codes").write_text("75\n75\n2\n")
    told = {"CALLS": str(tmp_path / "calls"), "CODES": str(tmp_path / "codes"), "SHELL": "/bin/sh"}
    told |= {"LLMTRAIN": str(command), "TMUX_TMPDIR": str(tmp_path)}
    environment = {key: value for key, value in os.environ.items() if key != "TMUX"} | told
    words = [str(DEPLOY / "tmux.sh"), "mine", "seed=1"]
    subprocess.run(words, check=True, capture_output=True, env=environment)
    try:
        wait_until(lambda: "exit code 2" in screen(environment))
        assert (tmp_path / "calls").read_text() == "run seed=1\n" * 3
    finally:
        subprocess.run(["tmux", "kill-server"], check=True, env=environment)


def screen(environment: dict[str, str]) -> str:
    """What the session shows."""
    ask = ["tmux", "capture-pane", "-p", "-t", "mine"]
    return subprocess.run(ask, capture_output=True, text=True, check=True, env=environment).stdout
