"""What every adapter gives the engine: how stored weights are loaded, and what is put on them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmtrain.schema import Part, unlearned

if TYPE_CHECKING:
    import torch

    from llmtrain.model.facts import Facts
    from llmtrain.model.linear import Adaptable


@dataclass
class Adapter(Part):
    """``lr`` is what is sensible to train it with: ``optimizer.lr`` points here.

    ``opening`` are the lines of Python that open what was saved. ``weight_bytes`` is what a frozen
    weight takes where it is not the training's 2 or 4.
    """

    lr: float | None = unlearned(None, above=0)

    freezes: ClassVar[bool] = False
    opening: ClassVar[str] = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("{folder}")'
    )
    weight_bytes: ClassVar[float | None] = None

    def check(self) -> None:
        """Raise ConfigError for settings that cannot be."""

    def check_here(self, path: str | None) -> None:
        """Raise ConfigError for what this machine lacks; ``path`` is where the weights lie."""

    def check_layers(self, facts: "Facts") -> None:
        """Raise ConfigError for layers that the model has not, or that cannot be adapted."""

    def num_trainable(self, facts: "Facts") -> int:
        """How many parameters are trained."""
        return facts.num_parameters

    def loading(self, dtype: "torch.dtype", facts: "Facts") -> dict[str, Any]:
        """Keyword arguments with which transformers loads the weights."""
        return {}

    def stand_in(self, model: Any, facts: "Facts") -> None:
        """Make a model without values keep its frozen weights as :meth:`loading` would."""

    def put_on(self, model: Any, layers: "Adaptable") -> Any:
        """The model with the adapter, all else frozen."""
        return model
