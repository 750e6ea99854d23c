"""Lion (Chen et al. 2023): the sign of a momentum, with one state instead of two."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmtrain.optimizer.base import Optimizer, require_compiler
from llmtrain.schema import learned

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from llmtrain.trace import Weights


@dataclass
class Lion(Optimizer):
    """DeepSpeed's Lion, fused on a GPU and vectorised on the host."""

    kind: str = "lion"
    beta1: float = learned(0.9, low=0, high=1)
    beta2: float = learned(0.99, low=0, high=1)

    offloads: ClassVar[bool] = True
    compiles_for_gpu: ClassVar[bool] = True
    state_bytes: ClassVar[float] = 4.0

    def check_here(self) -> None:
        require_compiler("optimizer", self.kind, "take optimizer=adamw")

    def bytes_of_state(self, weights: "Weights", on_host: bool) -> float:
        """DeepSpeed's Lion on a host keeps a second state, which it does not use."""
        return (8.0 if on_host else 4.0) * weights.num_trainable

    def build(self, model: "nn.Module", device: str, offloaded: bool) -> "TorchOptimizer":
        from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

        on_host = offloaded or device == "cpu"
        lion = DeepSpeedCPULion if on_host else FusedLion
        return lion(self.groups(model), lr=self.lr, betas=(self.beta1, self.beta2))
