"""Which weights of a model an adapter can sit on."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

USED_BY_WEIGHT = ("dt_proj", "out_proj")  # a Mamba mixer's fused scan goes past these modules


class Adaptable(NamedTuple):
    """Names of linear layers, and of parameters that stack the matrices of a mixture's experts."""

    modules: list[str]
    parameters: list[str]


def adaptable(model: "nn.Module") -> Adaptable:
    """All linear layers but the output head, and all experts, by names as short as can be."""
    linear = [name for name, _ in linear_layers(model)]
    chosen = [name for name, _ in adaptable_layers(model)]
    experts = [name for name, _ in stacks(model)]
    return Adaptable(shortened(chosen, linear), shortened(experts, experts))


def adaptable_layers(model: "nn.Module") -> list[tuple[str, Any]]:
    """The linear layers that an adapter can sit on, by their full names.

    Left out is what a state-space mixer multiplies with without calling the module: an adapter
    there would learn nothing, or only until a fused kernel is installed.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [
        (name, module)
        for name, module in linear_layers(model)
        if module is not head and not is_used_by_weight(model, name)
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
    parent, _, last = name.rpartition(".")
    mixer = type(model.get_submodule(parent)).__name__
    return last in USED_BY_WEIGHT and "mamba" in mixer.lower()


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
