"""LoRA: a product of two thin matrices beside each frozen one (Hu et al. 2021)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmtrain.adapter.base import Adapter
from llmtrain.errors import ConfigError, nearest
from llmtrain.schema import learned

if TYPE_CHECKING:
    from llmtrain.model.facts import Facts
    from llmtrain.model.linear import Adaptable


@dataclass
class LoRA(Adapter):
    """Updates ``alpha / rank`` times the product of two matrices of ``rank`` columns and rows.

    ``target_modules`` is ``auto`` (every linear layer but the head, and every expert) or a list of
    names of linear layers or their endings, as peft takes them.
    """

    kind: str = "lora"
    rank: int = learned("???", low=1)
    alpha: float = learned("???", above=0)
    dropout: float = learned(0.0, low=0, high=0.9)
    target_modules: Any = "auto"

    freezes: ClassVar[bool] = True
    opening: ClassVar[str] = (
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("{folder}")'
    )
    use_dora: ClassVar[bool] = False

    def check_here(self, path: str | None) -> None:
        if path is None:
            reason = "adapts weights that exist, and this model starts afresh"
            remedy = "take model=pretrained model.path=<folder or hub name>, or adapter=none"
            raise ConfigError("adapter", self.kind, reason, remedy)

    def check(self) -> None:
        if self.target_modules != "auto" and not names(self.target_modules):
            reason = "names no layer"
            raise ConfigError(
                "adapter.target_modules", self.target_modules, reason, "give auto or a list"
            )

    def check_layers(self, facts: "Facts") -> None:
        endings = {name.rpartition(".")[2] for name in facts.linear}
        for name in self.named:
            if not facts.named([name]):
                reason = "names no linear layer that can be adapted"
                remedy = f"{nearest(name, endings)}, or take auto"
                raise ConfigError("adapter.target_modules", name, reason, remedy)
        if facts.expert_width and not self.named:
            self.check_experts()

    def check_experts(self) -> None:
        """Experts are stacked parameters, on which peft has plain LoRA only."""
        reason = "is not possible on the experts of a mixture"
        if self.use_dora:
            remedy = "take adapter=lora, or name adapter.target_modules"
            raise ConfigError("adapter", self.kind, reason, remedy)
        if self.dropout:
            remedy = "set it to 0, or name adapter.target_modules"
            raise ConfigError("adapter.dropout", self.dropout, reason, remedy)

    def num_trainable(self, facts: "Facts") -> int:
        """A product of this rank beside a matrix of a x b has rank x (a + b) parameters."""
        experts = 0 if self.named else facts.expert_width
        return self.rank * (sum(map(sum, self.sizes(facts))) + experts)

    def sizes(self, facts: "Facts") -> list[tuple[int, int]]:
        """Inputs and outputs of each linear layer that is adapted."""
        layers = facts.named(self.named) if self.named else facts.adaptable
        return list(layers.values())

    @property
    def named(self) -> list[str]:
        """The modules that were asked for by name; none for auto."""
        return [] if self.target_modules == "auto" else names(self.target_modules)

    def put_on(self, model: Any, layers: "Adaptable") -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.named or layers.modules,
            target_parameters=None if self.named else layers.parameters or None,
            use_dora=self.use_dora,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def names(asked: Any) -> list[str]:
    """Module names from a list, or from one name."""
    return [asked] if isinstance(asked, str) else [str(name) for name in asked or []]
