"""Linear decay."""

from dataclasses import dataclass

from llmtrain.schedule.base import Schedule
from llmtrain.schema import learned


@dataclass
class Linear(Schedule):
    """A straight line from 1 down to ``final_factor``."""

    kind: str = "linear"
    final_factor: float = learned(0.0, low=0, high=1)

    def shape(self, progress: float) -> float:
        return 1 - (1 - self.final_factor) * progress
