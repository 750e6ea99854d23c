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
    module names or their endings, as peft takes them.
    """

    kind: str = "lora"
    rank: int = learned("???", low=1)
    alpha: float = learned("???", above=0)
    dropout: float = learned(0.0, low=0, high=0.9)
    target_modules: Any = "auto"

    freezes: ClassVar[bool] = True
    use_dora: ClassVar[bool] = False

    def check(self, path: str | None, precision: str | None) -> None:
        if path is None:
            reason = "adapts weights that exist, and this model starts afresh"
            remedy = "take model=pretrained model.path=<folder or hub name>, or adapter=none"
            raise ConfigError("adapter", self.kind, reason, remedy)
        if self.target_modules != "auto" and not names(self.target_modules):
            reason = "names no layer"
            raise ConfigError(
                "adapter.target_modules", self.target_modules, reason, "give auto or a list"
            )

    def num_trainable(self, facts: "Facts") -> int:
        """Of ``auto``; of a list, at most that many."""
        return self.rank * facts.adaptable_width

    def put_on(self, model: Any, layers: "Adaptable") -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        is_auto = self.target_modules == "auto"
        modules = layers.modules if is_auto else names(self.target_modules)
        experts = layers.parameters if is_auto else []
        self.check_experts(experts)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=modules,
            target_parameters=experts or None,
            use_dora=self.use_dora,
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:  # a name that no layer has, or that peft knows not to work
            reason = f"is refused: {' '.join(str(error).split())[:200]}"
            remedy = f"{nearest(modules[0], layers.modules)}, or auto"
            raise ConfigError("adapter.target_modules", modules, reason, remedy) from None

    def check_experts(self, experts: list[str]) -> None:
        """Experts are stacked parameters, on which peft has plain LoRA only."""
        if experts and (self.dropout or self.use_dora):
            key, value = (
                ("adapter", self.kind) if self.use_dora else ("adapter.dropout", self.dropout)
            )
            remedy = "take adapter=lora" if self.use_dora else "set it to 0"
            reason = "is not possible on the experts of a mixture"
            raise ConfigError(key, value, reason, f"{remedy}, or name adapter.target_modules")


def names(asked: Any) -> list[str]:
    """Module names from a list, or from one name."""
    return [asked] if isinstance(asked, str) else [str(name) for name in asked or []]
