"""What a user can do wrong, said in one line; and the exit codes of every command."""

import difflib
import errno
from collections.abc import Iterable
from typing import Any

DONE = 0
FAILED = 1
REFUSED = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped, and the same command continues

OUT_OF_MEMORY = (
    "out of memory",  # CUDA, NCCL
    "allocate memory",  # "DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory"
    "bad_alloc",
    "alloc_failed",  # cuBLAS
)


class ConfigError(Exception):
    """A user's mistake, found before anything started.

    It reads ``key=value reason; remedy.`` and ends the command with exit code 2.
    """

    def __init__(self, key: str, value: object, reason: str, remedy: str) -> None:
        super().__init__(f"{key}={show(value)} {reason}; {remedy}.")
        self.key = key
        self._parts = (key, value, reason, remedy)

    def __reduce__(self) -> Any:
        """Made again from its parts, on its way from one process to another."""
        return type(self), self._parts


class TrainingError(Exception):
    """A run that started and could not end: one line, exit code 1."""


class OutOfMemory(TrainingError):
    """Memory ran out after ``num_steps`` whole steps since the ranks started."""

    def __init__(self, error: BaseException, num_steps: int) -> None:
        said = (str(error) or repr(error)).splitlines()[0]
        super().__init__(f"out of memory after {num_steps} steps: {said}")
        self.num_steps = num_steps


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a rank had no memory left, in the words of torch's allocators and of the system."""
    words = str(error).lower()
    said = any(phrase in words for phrase in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and said)


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, or what this user may take of it, had no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_final(error: BaseException) -> bool:
    """Whether a new start from the same checkpoint would end in the same way."""
    is_known = isinstance(error, ConfigError | TrainingError)
    return is_known and not isinstance(error, OutOfMemory)


def show(value: object) -> str:
    """A config value as one writes it on the command line."""
    return "null" if value is None else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for a name that does not exist: the nearest that does, or all if they are few."""
    choices = sorted(set(known))
    found = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if found:
        return f"the nearest is {found[0]}"
    return f"choose one of {', '.join(choices)}" if len(choices) < 40 else "see --cfg job for all"
