"""What every mode gives the one training loop."""

# B batch, L length, D width (or V vocabulary, of a model whose logits are no plain product)

from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.schema import Part, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn


class Loss(NamedTuple):
    """A micro-batch's summed loss in nats, the number of tokens in the sum, and named extras.

    ``penalty`` is a mean that is added to the mean loss (a router's balance loss); 0 without one.
    """

    loss_sum: "Tensor"
    num_tokens: "Tensor"
    penalty: "Tensor | float"
    extras: "dict[str, Tensor]"


class Reading(NamedTuple):
    """What a model makes of a batch: features [B, L, D] whose logits are ``head(features)``."""

    features_BLD: "Tensor"
    head: "nn.Module"
    penalty: "Tensor | float"
    extras: "dict[str, Tensor]"


class Learner:
    """A causal language model that can be read up to its head, where it has a plain one.

    So the vocabulary's logits need not exist for more tokens at once than a loss wants.
    """

    def __init__(self, model: Any) -> None:
        from torch import nn

        self.model = model
        self.takes_positions = "position_ids" in signature(base_of(model).forward).parameters
        self.same = nn.Identity()  # the head of a model that gives its logits at once

    @cached_property
    def parts(self) -> "tuple[nn.Module, nn.Module] | None":
        """Body and head; tried at the first reading, when the weights are where they belong."""
        from llmtrain.kernel.heads import plain_head

        return plain_head(self.model)

    def read(self, inputs: "dict[str, Tensor]") -> Reading:
        """The features of input_ids [B, L]; position_ids restart with each packed document."""
        from llmtrain.kernel.packed import tell_documents

        parts = self.parts
        tell_documents(self.model, inputs.get("position_ids"))
        if not self.takes_positions:
            inputs = {name: values for name, values in inputs.items() if name != "position_ids"}
        if parts is not None:
            body, head = parts
            hidden_BLD = body(**inputs, use_cache=False).last_hidden_state
            # Mamba keeps its residuals in fp32
            return Reading(hidden_BLD.to(next(head.parameters()).dtype), head, 0.0, {})
        output = self.model(**inputs, use_cache=False)
        balance = getattr(output, "aux_loss", None)
        if balance is None:
            return Reading(output.logits, self.same, 0.0, {})
        coefficient = self.model.config.router_aux_loss_coef
        extras = {"router_balance_loss": balance}
        return Reading(output.logits, self.same, coefficient * balance, extras)

    def forget_documents(self) -> None:
        """Let state-space layers run on over a whole row again, as generating needs it."""
        from llmtrain.kernel.packed import tell_documents

        tell_documents(self.model, None)


def base_of(model: Any) -> Any:
    """The transformers model below an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass
class Mode(Part):
    """``recipe`` holds what is sensible to train with in this mode; ``train`` points at it."""

    recipe: Recipe = field(default_factory=Recipe)

    @property
    def wants_rows(self) -> bool | None:
        """Whether data has to be rows with answers (True), a stream of text (False), or either."""
        return None

    @property
    def needs_teacher(self) -> bool:
        """Whether a second model is read in every step."""
        return False

    def check(self) -> None:
        """Raise ConfigError for settings that contradict each other."""

    @property
    def caches_targets(self) -> bool:
        """Whether the teacher is asked once, before training."""
        return False

    @property
    def packs(self) -> bool:
        """Whether a sequence may hold several documents."""
        return True

    def rewritten(
        self, learner: Learner, batch: "dict[str, Tensor]", key: int, is_partitioned: bool
    ) -> "dict[str, Tensor]":
        """The micro-batch as it is trained on; ``key`` is a seed that all ranks share."""
        return batch

    def loss(self, learner: Learner, batch: dict[str, Any], teacher: Learner | None = None) -> Loss:
        """The loss of one micro-batch."""
        raise NotImplementedError
