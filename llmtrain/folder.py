"""The run folder: every path of a run, atomic writes, and the lock that keeps two runs apart."""

import fcntl
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.errors import ConfigError, is_disk_full

T = TypeVar("T")


class RunFolder:
    """All paths of one run. Nothing else in the program joins a path below a run's folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """The plan in force: the newest, where other hardware made a new one."""
        numbered = sorted(self.path.glob("plan-*.json"), key=lambda path: int(path.stem[5:]))
        return numbered[-1] if numbered else self.path / "plan.json"

    @property
    def next_plan(self) -> Path:
        """Where a plan goes that differs from the one in force."""
        first = self.path / "plan.json"
        if not first.exists():
            return first
        number = int(self.plan.stem[5:]) + 1 if self.plan != first else 2
        return self.path / f"plan-{number}.json"

    @property
    def overrides(self) -> Path:
        return self.path / "overrides.txt"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def divergence(self) -> Path:
        """The last steps of a run whose numbers went wrong for good."""
        return self.path / "divergence.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def deepspeed(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def manifest(self) -> Path:
        return self.path / "data.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def tracker(self, kind: str) -> Path:
        """Where a kind of tracker keeps files of its own."""
        return self.path / "tracker" / kind

    @property
    def tracker_note(self) -> Path:
        """What the run is called at its trackers, and what they have been sent."""
        return self.path / "tracker.json"

    @property
    def tracker_log(self) -> Path:
        return self.logs / "tracker.log"

    @property
    def tracker_warning(self) -> Path:
        """Why the tracker takes nothing, as long as that lasts."""
        return self.logs / "tracker.warning"

    @property
    def parent(self) -> Path:
        """Of a branch: the run and the step that it began at."""
        return self.path / "parent.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def error(self, rank: int) -> Path:
        """What ended a rank, for the process that watches it."""
        return self.logs / f"rank_{rank}.error.json"

    @property
    def first_batch(self) -> Path:
        """What debug=true shows of the data."""
        return self.logs / "first_batch.txt"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def export(self, form: str) -> Path:
        """Where a model goes that is written in another form."""
        return self.path / "export" / form

    def next_evaluation(self, suite: str, which: str) -> Path:
        """``evaluations/<suite>-<which>-<n>.json`` with the first free number."""
        name = f"{suite.replace(':', '-').replace('/', '-')}-{which}"
        numbered = (self.path / "evaluations" / f"{name}-{number}.json" for number in count(1))
        return next(path for path in numbered if not path.exists())

    def checkpoint_steps(self) -> list[int]:
        """The steps of the published checkpoints, oldest first."""
        found = self.checkpoints.glob("step_*")
        return sorted(int(path.name[5:]) for path in found if path.name[5:].isdigit())

    @property
    def newest_step(self) -> int:
        """The step of the newest published checkpoint, 0 for none."""
        return max(self.checkpoint_steps(), default=0)

    def exists(self) -> bool:
        return self.config.exists()

    def read_status(self) -> dict[str, Any]:
        """What :meth:`write_status` wrote; empty where nothing was ever planned."""
        return json.loads(self.status.read_text()) if self.status.exists() else {}

    def write_status(self, state: str, step: int, error: str | None = None, **more: Any) -> None:
        """Say how the run is. ``time`` is in seconds since 1970, ``last_checkpoint`` a step.

        ``more`` adds to these or replaces them; counts hold until somebody gives others.
        """
        before = self.read_status()
        status = {
            "state": state,
            "step": step,
            "num_steps": before.get("num_steps"),
            "error": error,
            "time": time.time(),
            "eta_seconds": None,
            "last_checkpoint": max(self.checkpoint_steps(), default=None),
            "restarts": before.get("restarts", 0),
            "skipped_steps": before.get("skipped_steps", 0),
        }
        try:
            write_json(self.status, status | more)
        except OSError as error:  # whoever trains goes on without having said so
            if not is_disk_full(error):
                raise

    def is_locked(self) -> bool:
        """Whether a process holds the folder now. Nothing is written, and no start is disturbed."""
        try:
            handle = os.open(self.path / ".lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        except PermissionError:
            return True  # another user's: by its lock nobody can say that it has ended
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    @contextmanager
    def lock(self, wait_seconds: float = 5.0) -> Iterator[str | None]:
        """Hold the folder for one run; gives the last holder, where that died while it held it.

        The system frees a dead holder's lock. Raises ConfigError naming a holder that lives.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot be made: {error.strerror}"
            remedy = "give another output_root or name"
            raise ConfigError("output_root", self.path, reason, remedy) from None
        holder = self.path / ".holder"
        try:
            with FileLock(self.path / ".lock").acquire(timeout=wait_seconds):
                left_by = holder.read_text() if holder.exists() else None
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
                try:
                    yield left_by
                finally:
                    holder.unlink(missing_ok=True)
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            raise ConfigError(
                "name", self.path.name, f"is being trained by {who}", "wait for it, or vary name"
            ) from None


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there wholly or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there wholly or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_cached(path: Path, build: Callable[[Any], T]) -> T | None:
    """What is made of a JSON file in a cache; None where it is missing or damaged."""
    try:
        return build(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cached(path: Path, value: Any) -> None:
    """Keep something for the next time, if the cache can be written to."""
    with suppress(OSError):
        write_json(path, value)


def finite(value: Any) -> Any:
    """A value as JSON knows it: null for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished folder into its place, all of its bytes on disk first."""
    for file in [*temporary.rglob("*"), temporary]:
        sync(file)
    if path.exists():
        aside = path.with_name(f".{path.name}.{time.time_ns()}.old")
        os.rename(path, aside)
        os.rename(temporary, path)
        shutil.rmtree(aside)
    else:
        os.rename(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
