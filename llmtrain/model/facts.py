"""What the plan needs to know of a model, measured on the meta device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.model.linear import adaptable_layers, called_layers, ends_with, linear_layers, stacks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Parameters(NamedTuple):
    """Counts of parameters: all; those that one token uses; those in its matrix products."""

    total: int
    active: int
    matmul: int


@dataclass(frozen=True)
class Facts:
    """What the plan needs to know of a model: counts, and the widths that activations have.

    ``linear`` are inputs and outputs of each layer that an adapter can sit on, ``left_out`` the
    names of those that it does not unless it is told to, and of those that it cannot.
    ``expert_width`` is the sum of both over the matrices of all experts.
    """

    model_type: str
    num_parameters: int
    num_active_parameters: int
    num_matmul_parameters: int
    num_layers: int
    num_attention_layers: int
    width: int
    attention_width: int
    kv_width: int
    feed_forward: int
    vocab_size: int
    max_seq_len: int | None
    supports_flash: bool
    supports_sdpa: bool
    supports_blocks: bool
    linear: dict[str, tuple[int, int]]
    left_out: list[str]
    expert_width: int

    @property
    def adaptable(self) -> dict[str, tuple[int, int]]:
        """The linear layers that an adapter sits on unless it is told other ones."""
        return {name: sizes for name, sizes in self.linear.items() if name not in self.left_out}

    def named(self, endings: list[str]) -> dict[str, tuple[int, int]]:
        """The linear layers that peft takes these names for."""
        return {name: sizes for name, sizes in self.linear.items() if ends_with(name, set(endings))}


def measure(config: "PreTrainedConfig", trust_remote_code: bool = False) -> Facts:
    """Counts and widths of a configuration, from the model itself on the meta device."""
    model = on_meta(config, trust_remote_code)
    counts = count_parameters(model)
    width = config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 0
    head_dim = getattr(config, "head_dim", None) or (width // heads if heads else 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attending = num_attention_layers(config)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return Facts(
        model_type=config.model_type,
        num_parameters=counts.total,
        num_active_parameters=counts.active,
        num_matmul_parameters=counts.matmul,
        num_layers=config.num_hidden_layers,
        num_attention_layers=attending,
        width=width,
        attention_width=heads * head_dim if attending else 0,
        kv_width=kv_heads * head_dim if attending else 0,
        feed_forward=(getattr(config, "intermediate_size", None) or 4 * width) * experts,
        vocab_size=config.vocab_size,
        max_seq_len=getattr(config, "max_position_embeddings", None),
        supports_flash=supports_flash(config, head_dim),
        supports_sdpa=bool(getattr(model, "_supports_sdpa", False)),
        supports_blocks=supports_blocks(model),
        linear={name: sizes_of(layer) for name, layer in called_layers(model)},
        left_out=left_out(model),
        expert_width=sum(len(param) * sum(param.shape[1:]) for _, param in stacks(model)),
    )


def supports_flash(config: "PreTrainedConfig", head_dim: int) -> bool:
    """Whether the model's class and heads work with flash-attn, whose heads end at 256."""
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return bool(getattr(known, "_supports_flash_attn", False)) and head_dim <= 256


def supports_blocks(model: Any) -> bool:
    """Whether its layers take an attention function of ours, which caps and sinks nothing."""
    takes_any = getattr(model, "_supports_attention_backend", False)
    is_plain = not getattr(model.config, "attn_logit_softcapping", None)
    # Its indexer chooses keys for attention functions that it knows, and shows others all.
    has_indexer = any(name.endswith("indexer") for name, _ in model.named_modules())
    return bool(
        takes_any and is_plain and not has_indexer and getattr(model, "_supports_sdpa", False)
    )


def possible_attention(facts: Facts, wanted: str) -> str:
    """What comes nearest to ``wanted`` of what a model has."""
    if wanted == "flash_attention_2" and not facts.supports_flash:
        wanted = "sdpa"
    if wanted == "blocks" and not facts.supports_blocks:
        wanted = "sdpa"
    if not facts.num_attention_layers or (wanted == "sdpa" and not facts.supports_sdpa):
        return "eager"
    return wanted


def num_attention_layers(config: "PreTrainedConfig") -> int:
    """How many layers attend over the sequence; the others keep a state."""
    if not getattr(config, "num_attention_heads", None):
        return 0
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None)
    if not kinds:
        return int(config.num_hidden_layers)
    return sum("attention" in kind and "linear" not in kind for kind in kinds)


def on_meta(config: "PreTrainedConfig", trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model of a configuration with shapes and no values."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def count_parameters(model: "PreTrainedModel") -> Parameters:
    """Parameters of a model by what they are for.

    Active leaves out the experts that a token is not routed to. Matmul counts the weights of
    linear layers and experts, so an embedding's look-up is left out and a tied head is counted.
    """
    total = sum(param.numel() for param in model.parameters())
    experts = [param for _, param in stacks(model)]
    num_experts = experts[0].shape[0] if experts else 1
    used = getattr(model.config, "num_experts_per_tok", None) or 1
    in_experts = sum(param.numel() for param in experts)
    in_use = in_experts * used // num_experts
    linear = sum(layer.weight.numel() for _, layer in linear_layers(model))
    return Parameters(total, total - in_experts + in_use, linear + in_use)


def sizes_of(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer: GPT-2's have their weight the other way round."""
    from transformers.pytorch_utils import Conv1D

    sizes = tuple(layer.weight.shape)
    return sizes if isinstance(layer, Conv1D) else sizes[::-1]  # type: ignore[return-value]


def left_out(model: "PreTrainedModel") -> list[str]:
    """The linear layers that an adapter does not sit on by itself."""
    adapted = {name for name, _ in adaptable_layers(model)}
    return [name for name, _ in linear_layers(model) if name not in adapted]
