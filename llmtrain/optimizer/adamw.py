"""AdamW (Loshchilov and Hutter 2019)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmtrain.optimizer.base import Optimizer
from llmtrain.schema import learned

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer


@dataclass
class AdamW(Optimizer):
    """torch's fused AdamW, or DeepSpeed's vectorised one where the state lives on the host."""

    kind: str = "adamw"
    beta1: float = learned(0.9, low=0, high=1)
    beta2: float = learned(0.999, low=0, high=1)
    eps: float = learned(1e-8, above=0)

    offloads: ClassVar[bool] = True

    def build(self, model: "nn.Module", device: str, offloaded: bool) -> "TorchOptimizer":
        betas = (self.beta1, self.beta2)
        if offloaded:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(self.groups(model), lr=self.lr, betas=betas, eps=self.eps)
        from torch.optim import AdamW as TorchAdamW

        return TorchAdamW(self.groups(model), lr=self.lr, betas=betas, eps=self.eps, fused=True)
