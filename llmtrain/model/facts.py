"""What the plan needs to know of a model, measured on the meta device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.model.linear import adaptable_layers, linear_layers, stacks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Parameters(NamedTuple):
    """Counts of parameters: all; those that one token uses; those in its matrix products."""

    total: int
    active: int
    matmul: int


@dataclass(frozen=True)
class Facts:
    """What the plan needs to know of a model: counts, and the widths that activations have."""

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
    adaptable_width: int
    adaptable_outputs: int
    num_linear_parameters: int


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
        **count_adaptable(model),
    )


def supports_flash(config: "PreTrainedConfig", head_dim: int) -> bool:
    """Whether the model's class and heads work with flash-attn, whose heads end at 256."""
    from transformers import AutoModelForCausalLM

    known = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return bool(getattr(known, "_supports_flash_attn", False)) and head_dim <= 256


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


def count_adaptable(model: "PreTrainedModel") -> dict[str, int]:
    """What an adapter's size follows from: widths of the layers that it sits on, and their weights.

    A product of rank r beside a matrix of a x b takes r(a + b) parameters.
    """
    layers = [layer for _, layer in adaptable_layers(model)]
    in_layers = sum(sum(layer.weight.shape) for layer in layers)
    in_experts = sum(len(param) * sum(param.shape[1:]) for _, param in stacks(model))
    outputs = sum(layer.weight.shape[1 if is_conv1d(layer) else 0] for layer in layers)
    return {
        "adaptable_width": in_layers + in_experts,
        "adaptable_outputs": outputs,
        "num_linear_parameters": sum(layer.weight.numel() for layer in layers),
    }


def is_conv1d(layer: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)
