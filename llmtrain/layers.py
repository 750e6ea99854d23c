"""Which of a model's layers are alike, so that few of them stand for all."""

from typing import Any, NamedTuple

MOST_WHOLE = 6  # so many layers are quicker traced than thought about


class Depth(NamedTuple):
    """A model's number of layers, and the numbers of layers to trace: one of them, or two."""

    num_layers: int
    traced: list[int]


def stack_of(model: Any) -> Any:
    """The list that holds a model's repeated layers; None for a model that has none."""
    from torch.nn import ModuleList

    lists = [module for module in model.modules() if isinstance(module, ModuleList)]
    return max(lists, key=num_parameters, default=None)


def num_parameters(module: Any) -> int:
    return sum(param.numel() for param in module.parameters())


def depth_of(model: Any, recompute: str) -> Depth:
    """How few layers show what each further one adds.

    After some first layers (dense ones before experts, say) the kinds of layers repeat with a
    period; two numbers of layers that are one period apart draw a line through all.
    """
    stack = stack_of(model)
    kinds = [kind_of(layer) for layer in stack] if stack is not None else []
    if recompute.isdigit():
        kinds = [(kind, number % int(recompute) == 0) for number, kind in enumerate(kinds)]
    total = len(kinds)
    first, period = repetition(kinds)
    few = first + 2 * period if period == 1 else first + period
    if total <= MOST_WHOLE or few + period >= total:
        return Depth(total, [total])
    # The line has to meet the whole depth a number of whole periods away.
    few += (total - few) % period
    return Depth(total, [few, few + period])


def kind_of(layer: Any) -> tuple[Any, ...]:
    """What layers have in common that take the same memory and time."""
    shapes = tuple((name, tuple(param.shape)) for name, param in layer.named_parameters())
    marks = tuple(
        (name, str(value))
        for name, value in vars(layer).items()
        if isinstance(value, str | bool | float | type(None)) and name != "training"
    )
    return (type(layer).__name__, shapes, marks)


def repetition(kinds: list[Any]) -> tuple[int, int]:
    """(first, period): from ``first`` on, a layer's kind is that of the one ``period`` before."""
    best = (len(kinds), 1)
    for period in range(1, len(kinds) // 2 + 1):
        breaks = [i for i in range(len(kinds) - period) if kinds[i] != kinds[i + period]]
        first = breaks[-1] + 1 if breaks else 0
        if first + 2 * period < sum(best) + best[1]:
            best = (first, period)
    return best
