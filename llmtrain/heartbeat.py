"""Signs of life: how far each rank is, in memory that it shares with the process that watches it.

A sign is a store into mapped memory. It costs no system call and no disk, so a rank may give one
wherever it is about to wait for the others.
"""

import mmap
import os
import statistics
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

VARIABLE = "LLMTRAIN_HEARTBEATS"  # the descriptor that ranks inherit
LAYOUT = struct.Struct("=qdd?")  # a Beat; each rank of a node has one such place
RECENT_STEPS = 64


class Beat(NamedTuple):
    """What a rank says of itself.

    ``step`` is its last whole step, ``time`` that of its last sign on the system's monotonic clock,
    ``step_seconds`` the median of its recent steps. ``is_stepping`` is false while it starts,
    evaluates or saves, which may take as long as it takes.
    """

    step: int = 0
    time: float = 0.0
    step_seconds: float = 0.0
    is_stepping: bool = False


class Heartbeat:
    """The place in which one rank gives its signs."""

    def __init__(self, memory: mmap.mmap, place: int) -> None:
        self.memory = memory
        self.place = place
        self.beat = Beat()
        self.since = time.monotonic()
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)

    @classmethod
    def inherited(cls) -> "Heartbeat":
        """This rank's place with its launcher; one that nobody reads where there is none."""
        if VARIABLE not in os.environ:
            return cls(mmap.mmap(-1, LAYOUT.size), 0)
        return cls(mmap.mmap(int(os.environ[VARIABLE]), 0), int(os.environ["LOCAL_RANK"]))

    def give(self, beat: Beat) -> None:
        """Show a state of this rank, with the time."""
        self.beat = beat._replace(time=time.monotonic())
        LAYOUT.pack_into(self.memory, self.place * LAYOUT.size, *self.beat)

    def sign(self) -> None:
        """This rank lives, and may be about to wait for others."""
        self.give(self.beat)

    def stepped(self, step: int) -> None:
        """A step is whole and the next begins; the first, with its compilers, sets no pace."""
        now = time.monotonic()
        if self.beat.is_stepping:
            self.recent.append(now - self.since)
        self.since = now
        median = statistics.median(self.recent) if self.recent else 0.0
        self.give(Beat(step, now, median, is_stepping=True))

    def rest(self) -> None:
        """No more steps: what follows may take long."""
        self.give(self.beat._replace(is_stepping=False))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside is no part of a step, and may take long."""
        start, was_stepping = time.monotonic(), self.beat.is_stepping
        self.rest()
        yield
        self.since += time.monotonic() - start
        self.give(self.beat._replace(is_stepping=was_stepping))


class Heartbeats:
    """The places of all ranks of this node, for the process that starts and watches them."""

    def __init__(self, num_ranks: int) -> None:
        self.descriptor = os.memfd_create("heartbeats")
        os.truncate(self.descriptor, num_ranks * LAYOUT.size)
        self.memory = mmap.mmap(self.descriptor, 0)

    @property
    def environment(self) -> dict[str, str]:
        """What a rank is told, which must inherit the descriptor as well."""
        return {VARIABLE: str(self.descriptor)}

    def of(self, rank: int) -> Beat:
        """The last sign of a rank."""
        return Beat(*LAYOUT.unpack_from(self.memory, rank * LAYOUT.size))

    def close(self) -> None:
        self.memory.close()
        os.close(self.descriptor)
