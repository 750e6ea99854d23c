"""No tracker: the run folder and TensorBoard have everything."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.tracker.base import Tracker


@dataclass
class NoTracker(Tracker):
    """Nobody is told."""

    kind: str = "none"

    is_on: ClassVar[bool] = False

    def check_here(self) -> None:
        """Nothing is needed."""
