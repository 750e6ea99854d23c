"""What every typed part of the config shares: its kind, its identity, and where parts are found."""

import importlib
import math
import pkgutil
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from llmtrain.errors import ConfigError, nearest

GROUPS = {  # group of the config -> package whose modules are its kinds
    "model": "llmtrain.model",
    "data": "llmtrain.data.source",
    "optimizer": "llmtrain.optimizer",
    "schedule": "llmtrain.schedule",
    "mode": "llmtrain.mode",
    "adapter": "llmtrain.adapter",
    "callback": "llmtrain.callback",
    "tracker": "llmtrain.tracker",
    "launcher": "launchers",
    "sweep": "llmtrain.sweep",
}
SEVERAL = ("callback",)  # groups of which a run may have several parts, each under its name


@dataclass
class Part:
    """One choice of a config group. ``kind`` is the name of the module that defines its class."""

    kind: str = "???"


def learned(default: Any, **bounds: float) -> Any:
    """A field of what a run learns, with the bounds that :func:`check_bounds` holds it to."""
    return field(default=default, metadata={"learned": True, **bounds})


def unlearned(default: Any = None, **bounds: float) -> Any:
    """A field that decides where or how fast a run trains and never what it learns.

    Such a field is left out of the run's identity (see :func:`learned_values`).
    """
    return field(default=default, metadata={"learned": False, **bounds})


def unlearned_part(factory: Any) -> Any:
    """A nested part, none of whose fields belongs to the run's identity."""
    return field(default_factory=factory, metadata={"learned": False})


@dataclass
class Recipe:
    """What is sensible to train with: where the defaults of ``train`` and ``optimizer`` point.

    Rate, length and batch are learned where they are pointed at from; the horizon is used here.
    """

    lr: float = unlearned("???", above=0)
    seq_len: int = unlearned("???", low=1)
    global_batch: int = unlearned("???", low=1)
    max_tokens: float | None = learned(None, above=0)
    max_epochs: float | None = learned(None, above=0)


def kinds(group: str) -> dict[str, type[Part]]:
    """Every kind of a group, found by listing the folder of its package."""
    package = importlib.import_module(GROUPS[group])
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    found = {name: part_of(f"{package.__name__}.{name}") for name in names}
    return {name: part for name, part in found.items() if part is not None}


def part_of(module_name: str) -> type[Part] | None:
    """The class that a module defines with its own name as ``kind``; none for a helper module."""
    module = importlib.import_module(module_name)
    for value in vars(module).values():
        is_part = isinstance(value, type) and issubclass(value, Part)
        if is_part and value.__module__ == module_name and value.kind == module_name.split(".")[-1]:
            return value
    return None


def part_of_values(group: str, values: dict[str, Any], key: str) -> Part:
    """A part of a group from plain values, without Hydra; ``key`` is where these stand.

    Raises ConfigError for a kind that does not exist.
    """
    from omegaconf import OmegaConf

    known = kinds(group)
    if (kind := values.get("kind")) not in known:
        raise ConfigError(f"{key}.kind", kind, "does not exist", nearest(str(kind), known))
    schema = OmegaConf.structured(known[values["kind"]])
    return OmegaConf.to_object(OmegaConf.merge(schema, values))  # type: ignore[return-value]


def learned_values(part: Any, prefix: str = "") -> dict[str, Any]:
    """``{"dotted.key": value}`` of what a run learns, where it differs from the schema's default.

    A key that is added later with a neutral default therefore changes no run's identity.
    """
    values: dict[str, Any] = {}
    for item in fields(part):
        value = getattr(part, item.name)
        if item.metadata.get("learned") is False or is_neutral(item, value):
            continue
        nested = parts_in(prefix + item.name, value)
        for key, each in nested.items():
            values |= learned_values(each, f"{key}.")
        if not nested:
            values[prefix + item.name] = value
    return values


def parts_in(key: str, value: Any) -> dict[str, Any]:
    """``{"dotted.key": part}`` of a part, or of several by their names; nothing for a value."""
    if is_dataclass(value):
        return {key: value}
    named = value.items() if isinstance(value, dict) else ()
    return {f"{key}.{name}": each for name, each in named if is_dataclass(each)}


def is_neutral(item: Any, value: Any) -> bool:
    """Whether a value says nothing: a default, or the kind ``none`` of a group that is not used.

    Each kind is its own class's default and yet tells it from the others.
    """
    return bool(value == "none" if item.name == "kind" else value == default_of(item))


def check_bounds(part: Any, prefix: str = "") -> None:
    """Hold every number to the bounds of its field: ``low``, ``above`` (exclusive), ``high``.

    Raises ConfigError naming the first number that is outside.
    """
    for item in fields(part):
        value, key = getattr(part, item.name), prefix + item.name
        for nested, each in parts_in(key, value).items():
            check_bounds(each, f"{nested}.")
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(key, value, item.metadata)


def check_number(key: str, value: float, bounds: Any) -> None:
    """One number against its bounds."""
    low, above, high = (bounds.get(name) for name in ("low", "above", "high"))
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, value, "is not a finite number", "give a finite one")
    if low is not None and value < low:
        raise ConfigError(key, value, f"is below {low}", f"give {low} or more")
    if above is not None and value <= above:
        raise ConfigError(key, value, f"is not above {above}", f"give more than {above}")
    if high is not None and value > high:
        raise ConfigError(key, value, f"is above {high}", f"give {high} or less")


def default_of(item: Any) -> Any:
    """The default of a dataclass field, or a value that nothing equals where it has none."""
    if item.default_factory is not MISSING:
        return item.default_factory()
    return item.default if item.default is not MISSING else object()
