"""Adafactor (Shazeer and Stern 2018): second moments kept as a row and a column per matrix."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmtrain.optimizer.base import Optimizer
from llmtrain.schema import learned

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer


@dataclass
class Adafactor(Optimizer):
    """torch's Adafactor."""

    kind: str = "adafactor"
    beta2_decay: float = learned(-0.8, high=0)
    clip_threshold: float = learned(1.0, above=0)

    # From stage 1 on gradients are flat, and the factoring would be lost in silence.
    stages: ClassVar[tuple[int, ...]] = (0,)
    state_bytes: ClassVar[float] = 0.01

    def build(self, model: "nn.Module", device: str, offloaded: bool) -> "TorchOptimizer":
        from torch.optim import Adafactor as TorchAdafactor

        return TorchAdafactor(
            self.groups(model), lr=self.lr, beta2_decay=self.beta2_decay, d=self.clip_threshold
        )
