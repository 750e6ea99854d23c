"""Muon (Jordan et al. 2024): the momentum of a hidden matrix, made orthogonal."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmtrain.errors import ConfigError
from llmtrain.optimizer.base import Optimizer, decays
from llmtrain.schema import learned

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from llmtrain.trace import Weights


@dataclass
class Muon(Optimizer):
    """DeepSpeed's Muon for hidden matrices, AdamW (``adam_*``) for embeddings, head and vectors.

    ``lr`` is in units of the spectral norm of an update, so one value serves every width.
    """

    kind: str = "muon"
    momentum: float = learned(0.95, low=0, high=1)
    adam_lr: float = learned("???", above=0)
    adam_beta1: float = learned(0.9, low=0, high=1)
    adam_beta2: float = learned(0.95, low=0, high=1)
    adam_eps: float = learned(1e-8, above=0)

    state_bytes: ClassVar[float] = 4.0
    whole_gradients: ClassVar[bool] = True
    names_compiler: ClassVar[bool] = True

    def check(self, device: str, grad_clip: float) -> None:
        if grad_clip > 0:  # under ZeRO it would clip the orthogonal update instead of the gradient
            reason = "clips what Muon has already scaled"
            raise ConfigError("train.grad_clip", grad_clip, reason, "set it to 0")

    def bytes_of_state(self, weights: "Weights", on_host: bool) -> float:
        """One momentum for hidden matrices, Adam's two for the rest."""
        rest = weights.num_trainable - weights.num_hidden
        return 4.0 * weights.num_hidden + 8.0 * rest

    def build(self, model: "nn.Module", device: str, offloaded: bool) -> "TorchOptimizer":
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
        from torch.optim import AdamW

        options = {"fused": True}
        return MuonWithAuxAdam(
            self.groups(model), adam_optimizer=AdamW, adam_optimizer_kwargs=options
        )

    def groups(self, model: "nn.Module") -> list[dict[str, Any]]:
        """Hidden matrices for Muon; embeddings and head, then vectors, for Adam."""
        outer = {id(module.weight) for module in ends(model) if module is not None}
        hidden: list[Any] = []
        rest: list[Any] = []
        for name, param in model.named_parameters():
            is_hidden = param.ndim == 2 and decays(name, param) and id(param) not in outer
            param.use_muon = is_hidden  # type: ignore[attr-defined]  # DeepSpeed looks for it
            if param.requires_grad:
                (hidden if is_hidden else rest).append(param)
        muon = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        adam = {
            "lr": self.adam_lr,
            "betas": (self.adam_beta1, self.adam_beta2),
            "eps": self.adam_eps,
            "weight_decay": 0.0,
        }
        return [
            # "standard" iterates in bf16 on every device, "gram" in fp16, which a CPU lacks
            {"params": hidden, "use_muon": True, "ns_method": "standard", **muon},
            {"params": rest, "use_muon": False, **adam},
        ]


def ends(model: "nn.Module") -> list[Any]:
    """The embedding and the head: their rows are words, not directions of one space."""
    return [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
