"""Which weights of a model an adapter can sit on."""

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn


# What peft takes for experts in the mixtures that transformers used to lay out as these two.
EXPERT_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


class Adaptable(NamedTuple):
    """Names of linear layers, and of parameters that stack the matrices of a mixture's experts."""

    modules: list[str]
    parameters: list[str]


def adaptable(model: "nn.Module") -> Adaptable:
    """All linear layers but the output head, and all experts, by names as short as can be."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    layers = [name for name, _ in adaptable_layers(model)]
    experts = [name for name, _ in stacks(model)]
    return Adaptable(shortened(layers, modules), shortened(experts, parameters))


def adaptable_layers(model: "nn.Module") -> list[tuple[str, Any]]:
    """The linear layers that an adapter can sit on, by their full names, but for the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [(name, module) for name, module in called_layers(model) if module is not head]


def called_layers(model: "nn.Module") -> list[tuple[str, Any]]:
    """The linear layers whose modules are called, by names that mean them to peft.

    Left out is what a state-space mixer multiplies with without calling the module: an adapter
    there would learn nothing, or only until a fused kernel is installed.
    """
    return [
        (name, module)
        for name, module in linear_layers(model)
        if not is_used_by_weight(model, name) and not is_taken_for_experts(model, name)
    ]


def stacks(model: Any) -> list[tuple[str, Any]]:
    """The parameters that stack one matrix for each expert."""
    return [
        (name, param)
        for name, param in model.named_parameters()
        if param.ndim == 3 and "conv" not in name and is_stack(param, model.config)
    ]


def is_stack(param: Any, config: Any) -> bool:
    """Whether a three-dimensional parameter stacks one matrix per expert."""
    sizes = ("num_experts", "num_local_experts", "n_routed_experts")
    return param.shape[0] in [getattr(config, name, None) for name in sizes]


def linear_layers(model: "nn.Module") -> list[tuple[str, Any]]:
    """The linear layers of a model by name (GPT-2 writes its own as Conv1D)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def is_used_by_weight(model: "nn.Module", name: str) -> bool:
    """Whether a state-space mixer reads a layer's weight, on its fused path if not on all."""
    parent, _, last = name.rpartition(".")
    mixer: Any = model.get_submodule(parent)
    kind: Any = type(mixer)
    return hasattr(mixer, "A_log") and f"self.{last}.weight" in source_of(kind)


@cache
def source_of(kind: Any) -> str:
    """The lines of a class, read once: a model has many layers of one class."""
    return inspect.getsource(kind)


def is_taken_for_experts(model: Any, name: str) -> bool:
    """Whether peft adapts a mixture's experts in place of this layer, at twice the rank."""
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    layout = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    return name.rpartition(".")[2] in EXPERT_NAMES.get(str(layout), ())


def shortened(chosen: list[str], everything: list[str]) -> list[str]:
    """Names without their layers' prefix where that means the same ones, as people write them."""
    for num_parts in (1, 2):
        endings = {".".join(name.split(".")[-num_parts:]) for name in chosen}
        matched = [name for name in everything if ends_with(name, endings)]
        if len(matched) == len(chosen):
            return sorted(endings)
    return chosen


def ends_with(name: str, endings: set[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)
