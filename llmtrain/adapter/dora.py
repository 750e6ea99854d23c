"""DoRA: LoRA on the direction of each weight, with its magnitude learned (Liu et al. 2024)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmtrain.adapter.lora import LoRA

if TYPE_CHECKING:
    from llmtrain.model.facts import Facts


@dataclass
class DoRA(LoRA):
    """As LoRA, and a magnitude for each output."""

    kind: str = "dora"

    use_dora: ClassVar[bool] = True

    def num_trainable(self, facts: "Facts") -> int:
        return super().num_trainable(facts) + sum(outputs for _, outputs in self.sizes(facts))
