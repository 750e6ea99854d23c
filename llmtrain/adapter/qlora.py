"""QLoRA: LoRA over weights that are kept in 4 bits (Dettmers et al. 2023)."""

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmtrain.adapter.lora import LoRA
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from llmtrain.model.facts import Facts
    from llmtrain.model.linear import Adaptable


@dataclass
class QLoRA(LoRA):
    """nf4 with double quantisation, multiplied in the training's precision."""

    kind: str = "qlora"

    opening: ClassVar[str] = (
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer, BitsAndBytesConfig\n"
        "as_trained = BitsAndBytesConfig(\n"
        '    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True\n'
        ")\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(\n"
        '    "{folder}", quantization_config=as_trained\n'
        ")"
    )
    weight_bytes: ClassVar[float | None] = 0.516  # 4 bits, and 0.127 for the scales (section 3)

    def check_here(self, path: str | None) -> None:
        super().check_here(path)
        if importlib.util.find_spec("bitsandbytes") is None:
            reason = "needs bitsandbytes, which is not installed"
            raise ConfigError("adapter", "qlora", reason, "run: pip install -e '.[qlora]'")

    def loading(self, dtype: "torch.dtype", facts: "Facts") -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_quant_storage=dtype,  # so that ZeRO can partition them like any weight
                llm_int8_skip_modules=facts.left_out,  # the head, and what is read past its module
            )
        }

    def stand_in(self, model: Any, facts: "Facts") -> None:
        from llmtrain.kernel.quantised import quantise

        quantise(model, facts.left_out)

    def put_on(self, model: Any, layers: "Adaptable") -> Any:
        for module in model.modules():
            # An evaluation would lay the weights out anew for a CPU's inference, in their place.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return super().put_on(model, layers)
