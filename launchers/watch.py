"""Sees that a rank hangs, and has every rank say where it is before it is ended."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from launchers.group import RankGroup
from llmtrain.heartbeat import Heartbeats
from llmtrain.ranks import STACK_SIGNAL

LONGEST_LOOK_SECONDS = 1.0
LAST_WORDS_SECONDS = 3.0


class HangWatch:
    """Counts for how long each rank has taken no step while it should have.

    Ranks wait for each other, so soon none takes a step: the one to blame is halted, or else the
    one whose last sign is the oldest. Time in which this process did not run either, because the
    machine slept, does not count.
    """

    def __init__(
        self, group: RankGroup, beats: Heartbeats, factor: float | None, floor_seconds: float
    ) -> None:
        self.group = group
        self.beats = beats
        self.factor = factor
        self.floor_seconds = floor_seconds
        self.looked_at = time.monotonic()
        self.steps: dict[int, int] = {}
        self.quiet_seconds: dict[int, float] = {}

    def cause(self) -> str | None:
        """Which rank hangs and how, in one line; None while all is well."""
        now = time.monotonic()
        passed = min(now - self.looked_at, LONGEST_LOOK_SECONDS)
        self.looked_at = now
        for rank in self.group.living:
            self.count(rank, passed)
        if self.factor is None or not any(map(self.is_too_quiet, self.group.living)):
            return None
        return self.line(min(self.group.living, key=self.order_of_blame))

    def count(self, rank: int, passed: float) -> None:
        """Add to the quiet time of a rank, or begin anew."""
        beat = self.beats.of(rank)
        is_due = beat.is_stepping or self.group.is_stopped(rank)
        is_quiet = is_due and beat.step == self.steps.get(rank)
        self.quiet_seconds[rank] = self.quiet_seconds[rank] + passed if is_quiet else 0.0
        self.steps[rank] = beat.step

    def is_too_quiet(self, rank: int) -> bool:
        """Whether a rank has taken no step for longer than any step may take."""
        most = max(self.floor_seconds, (self.factor or 0.0) * self.beats.of(rank).step_seconds)
        return self.quiet_seconds[rank] > most

    def order_of_blame(self, rank: int) -> tuple[bool, float]:
        return not self.group.is_stopped(rank), self.beats.of(rank).time

    def line(self, rank: int) -> str:
        """What is known of the rank to blame; a sign that is only the oldest proves no guilt."""
        beat, number = self.beats.of(rank), self.group.first_rank + rank
        if self.group.is_stopped(rank):
            return f"Rank {number} hangs: it was halted by a signal after step {beat.step}."
        quiet = f"no step after step {beat.step} for {self.quiet_seconds[rank]:.0f} s"
        return (
            f"The ranks hang: {quiet}, and one takes {beat.step_seconds:.2g} s; "
            f"rank {number} was the first to fall silent."
        )


def hear_last_words(group: RankGroup, log: Callable[[int], Path]) -> None:
    """Have the ranks that live write their stacks, and wait a little for what else they say."""
    sizes = {rank: size(log(rank)) for rank in group.living}
    group.send(STACK_SIGNAL)
    group.send(signal.SIGCONT)  # who was halted answers only when it goes on
    group.wait_until(lambda: not group.living, LAST_WORDS_SECONDS)
    for rank in group.living:
        if size(log(rank)) == sizes[rank] and log(rank).exists():
            with log(rank).open("a") as file:
                file.write("No stack: this rank was asked for it and did not answer.\n")


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
