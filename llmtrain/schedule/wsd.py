"""Warm-up, stable, decay (Hu et al. 2024)."""

from dataclasses import dataclass

from llmtrain.schedule.base import Schedule
from llmtrain.schema import learned


@dataclass
class Wsd(Schedule):
    """Constant, then a straight line to ``final_factor`` over the last ``decay_fraction``."""

    kind: str = "wsd"
    decay_fraction: float = learned(0.2, above=0, high=1)
    final_factor: float = learned(0.0, low=0, high=1)

    def shape(self, progress: float) -> float:
        decayed = max(0.0, progress - (1 - self.decay_fraction)) / self.decay_fraction
        return 1 - (1 - self.final_factor) * decayed
