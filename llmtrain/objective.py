"""A model and a mode as one module from a batch to its loss, and how its layers are recomputed."""

from typing import TYPE_CHECKING, Any

from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmtrain.mode.base import Loss, Mode


def objective_of(
    model: "PreTrainedModel", mode: "Mode", teacher: "PreTrainedModel | None" = None
) -> Any:
    """One module from a batch to its loss, so that ZeRO-3's hooks see every use of a weight.

    The teacher is no part of the module: DeepSpeed neither casts nor partitions it.
    """
    from torch import nn

    from llmtrain.mode.base import Learner

    learner = Learner(model)
    taught_by = Learner(teacher) if teacher is not None else None

    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.learner = learner
            self.teacher = taught_by

        def forward(self, batch: dict[str, Any]) -> "Loss":
            return mode.loss(learner, batch, taught_by)

    return Objective()


def checkpointable_layers(model: "PreTrainedModel") -> list[Any]:
    """The layers that transformers can recompute: its repeated blocks."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute(model: "PreTrainedModel", asked: str) -> None:
    """Keep a layer's input instead of its activations: for all layers, or for every k-th."""
    if asked == "none":
        return
    if not model.supports_gradient_checkpointing:
        reason = f"is not possible with {model.config.model_type}"
        raise ConfigError("train.activation_checkpointing", asked, reason, "take none")
    every = 1 if asked == "full" else int(asked)
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
