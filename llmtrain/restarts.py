"""How often the ranks of a run are started again, and when that cannot help."""

from typing import NamedTuple


class Reached(NamedTuple):
    """How far ranks came: the newest checkpoint that they left, and the last step of any rank."""

    checkpoint: int
    step: int


class Restarts:
    """At most ``most`` for one command, and none when ranks fail where they failed before."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.num = 0
        self.last: Reached | None = None
        self.is_stuck = False

    def __str__(self) -> str:
        return f"Restart {self.num} of {self.most}"

    def is_worth_one(self, reached: Reached) -> bool:
        """Whether ranks that came so far should start again; if so, it counts."""
        self.is_stuck = reached == self.last
        self.last = reached
        if self.num >= self.most or self.is_stuck:
            return False
        self.num += 1
        return True
