"""Whether training goes well, judged by the numbers of its last steps; no tensors, no clock.

All that is kept here goes into each checkpoint, so that a resumed run judges as it would have.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from llmtrain.errors import TrainingError
from llmtrain.folder import finite
from llmtrain.schema import unlearned

NUM_KEPT = 256  # steps
WINDOW = 128  # losses that a spike is measured against
LEAST = 32  # losses without which nothing is called a spike
SUSTAINED = 8  # losses in a row: the odds that as many of an even 128 lie in its tenth are 1e-8
LEAST_SPREAD = 0.02  # of the median: losses that hardly vary are no reason to call more a spike


@dataclass
class OnDivergence:
    """What to do when numbers go wrong.

    A step whose loss or gradient is not finite is skipped. After ``max_skipped_steps`` in a row, or
    losses above the median + ``spike_threshold`` * MAD of those before (null: never), the run goes
    back to the last good checkpoint, at most ``max_rollbacks`` times, and goes on behind the data
    that went wrong (``skip_data``) or over it again.
    """

    max_skipped_steps: int = unlearned(10, low=1)
    spike_threshold: float | None = unlearned(10.0, above=0)
    max_rollbacks: int = unlearned(2, low=0)
    skip_data: bool = unlearned(True)


class Diverging(TrainingError):
    """Numbers went wrong since step ``first_step``: go back before it, or end."""

    def __init__(self, reason: str, first_step: int) -> None:
        super().__init__(f"{reason}: lower optimizer.lr and start again.")
        self.reason = reason
        self.first_step = first_step


@dataclass
class TakenStep:
    """One step's numbers; a ``grad_norm`` that still lies on a device is read when it is saved."""

    step: int
    loss: float
    grad_norm: Any
    lr: float
    was_skipped: bool = False

    def saved(self) -> dict[str, Any]:
        """For JSON: what is not finite is null."""
        return {
            "step": self.step,
            "loss": finite(self.loss),
            "grad_norm": None if self.grad_norm is None else finite(float(self.grad_norm)),
            "lr": self.lr,
            "was_skipped": self.was_skipped,
        }


@dataclass
class Rollback:
    """The run went from the end of ``from_step`` back to the end of ``to_step``."""

    number: int
    reason: str
    from_step: int
    to_step: int
    skipped_data_steps: int


@dataclass
class Stability:
    """The last steps, and what was done about them.

    Step n (from 0) reads the data of step n + ``data_offset``. ``num_skipped`` counts all steps
    that changed nothing, ``num_in_row`` those at the end that no falling loss scale explains.
    """

    steps: deque[TakenStep] = field(default_factory=lambda: deque(maxlen=NUM_KEPT))
    num_skipped: int = 0
    num_in_row: int = 0
    data_offset: int = 0
    rollbacks: list[Rollback] = field(default_factory=list)

    def note(self, taken: TakenStep, is_overflow: bool) -> None:
        """Account for a step; ``is_overflow``: it was skipped for a loss scale that still falls."""
        self.steps.append(taken)
        self.num_skipped += taken.was_skipped
        if not is_overflow:
            self.num_in_row = self.num_in_row + 1 if taken.was_skipped else 0

    def check(self, settings: OnDivergence) -> None:
        """Raise Diverging if the last steps show it."""
        if self.num_in_row >= settings.max_skipped_steps:
            last = self.steps[-1]
            what = "gradient" if math.isfinite(last.loss) else "loss"
            many = f", the {self.num_in_row}th step in a row" if self.num_in_row > 1 else ""
            reason = f"Step {last.step}: the {what} is not finite{many}"
            raise Diverging(reason, self.first_skipped_in_row())
        limit = self.limit(settings)
        if self.num_above(limit) >= SUSTAINED:
            first, last = self.applied()[-SUSTAINED], self.steps[-1]
            reason = (
                f"Step {last.step}: the loss rose to {last.loss:.4g}, "
                f"above {limit:.4g} for {SUSTAINED} steps"
            )
            raise Diverging(reason, first.step)

    def is_suspicious(self, settings: OnDivergence) -> bool:
        """Whether the last steps might be the beginning of what is gone back from."""
        return self.num_in_row > 0 or self.num_above(self.limit(settings)) > 1

    def first_skipped_in_row(self) -> int:
        """The number of the first step since the last that was applied, as far as is known."""
        first = self.steps[-1].step
        for taken in reversed(self.steps):
            if not taken.was_skipped:
                break
            first = taken.step
        return first

    def applied(self) -> list[TakenStep]:
        return [taken for taken in self.steps if not taken.was_skipped]

    def limit(self, settings: OnDivergence) -> float:
        """Above it, a loss is beyond those before the last few; infinite if too few are known."""
        before = sorted(taken.loss for taken in self.applied()[:-SUSTAINED][-WINDOW:])
        if settings.spike_threshold is None or len(before) < LEAST:
            return math.inf
        center = median(before)
        spread = median(abs(loss - center) for loss in before)
        spread = max(spread, LEAST_SPREAD * abs(center))
        usual = before[len(before) * 9 // 10]  # losses of two kinds have a small MAD
        return max(usual, center + settings.spike_threshold * spread)

    def num_above(self, limit: float) -> int:
        """How many of the newest losses lie above a limit, without one between that does not."""
        count = 0
        for taken in reversed(self.applied()):
            if not taken.loss > limit:
                break
            count += 1
        return count

    def go_back(self, past: "Stability", rollback: Rollback) -> None:
        """Take up the steps of ``past``, and keep the account of what was done since."""
        self.steps, self.num_in_row = past.steps, past.num_in_row
        self.data_offset += rollback.skipped_data_steps
        self.rollbacks.append(rollback)

    def status(self) -> dict[str, int]:
        """What status.json says of it."""
        return {"skipped_steps": self.num_skipped, "rollbacks": len(self.rollbacks)}

    def columns(self) -> dict[str, list[Any]]:
        """The last steps for a plot: a list of each of their numbers."""
        rows = [taken.saved() for taken in self.steps]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "steps": [taken.saved() for taken in self.steps],
            "num_skipped": self.num_skipped,
            "num_in_row": self.num_in_row,
            "data_offset": self.data_offset,
            "rollbacks": [asdict(rollback) for rollback in self.rollbacks],
        }

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "Stability":
        """From a checkpoint; one of a version that kept no such account has nothing to say."""
        if not saved:
            return cls()
        counts = (saved["num_skipped"], saved["num_in_row"], saved["data_offset"])
        rollbacks = [Rollback(**values) for values in saved["rollbacks"]]
        return cls(deque(taken_steps(saved["steps"]), NUM_KEPT), *counts, rollbacks)


def taken_steps(saved: Iterable[dict[str, Any]]) -> Iterable[TakenStep]:
    """Steps from JSON, in which a loss that is not finite is null."""
    for values in saved:
        yield TakenStep(**values | {"loss": math.nan if values["loss"] is None else values["loss"]})
