"""Who a process is among its ranks, and that it never outlives the one that started it."""

import ctypes
import faulthandler
import os
import signal
import sys
from dataclasses import dataclass
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # prctl(2)
STACK_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class Ranks:
    """This process's place: ``rank`` of ``world_size``, and ``local_rank`` on its node."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> "Ranks":
        """What the launcher wrote into RANK, WORLD_SIZE and LOCAL_RANK."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ[name]) for name in names))

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however the parent ends.

    torchrun's agent gives each rank a session of its own, so no signal of the parent's reaches it.
    """
    if sys.platform != "linux":
        return
    parent = int(os.environ.get("LLMTRAIN_PARENT", os.getppid()))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def show_stacks() -> None:
    """From here on, print the stacks of all threads at a crash of the interpreter, and when asked.

    The process that watches us asks by STACK_SIGNAL before it ends a run that hangs or has failed.
    """
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL)


def leave() -> NoReturn:
    """End this process at once, when all that it had to do is done and written.

    Threads of gloo sometimes abort a process that ends with Python's clearing up.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
