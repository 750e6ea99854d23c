"""AdamW with 8-bit moments (Dettmers et al. 2022)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmtrain.errors import ConfigError
from llmtrain.optimizer.base import Optimizer, require_package
from llmtrain.schema import learned

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer


@dataclass
class AdamW8bit(Optimizer):
    """bitsandbytes' AdamW8bit: two bytes of moments a parameter instead of eight."""

    kind: str = "adamw8bit"
    beta1: float = learned(0.9, low=0, high=1)
    beta2: float = learned(0.999, low=0, high=1)
    eps: float = learned(1e-8, above=0)

    # The blocks that are quantised together follow a rank's flat partition; stage 3 re-partitions
    # inside each parameter, which makes blocks of a few values on many ranks.
    stages: ClassVar[tuple[int, ...]] = (0, 1, 2)
    state_bytes: ClassVar[float] = 2.0
    state_follows_weights: ClassVar[bool] = False
    moves: ClassVar[bool] = False  # 256 values share a scale, and other ranks hold other blocks

    def check(self, device: str, grad_clip: float) -> None:
        if device != "cuda":
            raise ConfigError(
                "optimizer", self.kind, f"has no kernel for {device}", "take optimizer=adamw"
            )

    def check_here(self) -> None:
        require_package("optimizer", self.kind, "bitsandbytes", "pip install bitsandbytes")

    def build(self, model: "nn.Module", device: str, offloaded: bool) -> "TorchOptimizer":
        from bitsandbytes.optim import adamw

        betas = (self.beta1, self.beta2)
        return adamw.AdamW8bit(self.groups(model), lr=self.lr, betas=betas, eps=self.eps)
