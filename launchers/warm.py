"""Ranks as forks of a process that has imported what they need, which takes seconds each time."""

import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM)
WAIT_SECONDS = 0.02

# Read when they are used; all else may have been read once and for all by an import.
LATE = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",  # torch is told again
    "CUDA_VISIBLE_DEVICES",
    "PYTHONPATH",
    "PATH",
    "LLMTRAIN_",
)

is_warm = False


def heat() -> None:
    """Say that this process and its forks have imported what a rank needs."""
    global is_warm
    is_warm = True


def can_fork(environment: dict[str, str]) -> bool:
    """Whether a rank may be a fork of this process, which a thread of it would not survive."""
    same = all(
        os.environ.get(name) == value
        for name, value in environment.items()
        if not name.startswith(LATE)
    )
    return is_warm and same and has_one_thread() and not has_cuda()


def has_one_thread() -> bool:
    """Whether this is known; where the system does not say, it is not."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except FileNotFoundError:
        return False


def has_cuda() -> bool:
    """Whether this process has asked CUDA for something, which a fork of it then cannot."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


class Fork:
    """A process as subprocess.Popen has it: ``python -u -m MODULE WORDS``, without the imports."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            become(command, environment)

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout)
            time.sleep(WAIT_SECONDS)
        return code


def become(command: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Be what ``command`` would have started, in a session of its own."""
    code = 1
    try:
        os.setsid()
        for number in TAKEN:
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        module = command[command.index("-m") + 1]
        sys.argv = list(command[command.index("-m") + 1 :])
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)
