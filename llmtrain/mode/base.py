"""What every mode gives the one training loop."""

from dataclasses import dataclass, field
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


@dataclass
class Mode(Part):
    """``recipe`` holds what is sensible to train with in this mode; ``train`` points at it."""

    recipe: Recipe = field(default_factory=Recipe)

    def loss(self, model: "nn.Module", batch: "dict[str, Any]") -> Loss:
        """The loss of one micro-batch."""
        raise NotImplementedError
