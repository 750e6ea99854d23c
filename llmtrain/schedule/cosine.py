"""Cosine decay (Loshchilov and Hutter 2017)."""

import math
from dataclasses import dataclass

from llmtrain.schedule.base import Schedule
from llmtrain.schema import learned


@dataclass
class Cosine(Schedule):
    """Half a cosine from 1 down to ``final_factor``."""

    kind: str = "cosine"
    final_factor: float = learned(0.0, low=0, high=1)

    def shape(self, progress: float) -> float:
        return self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * progress)) / 2
