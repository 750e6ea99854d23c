"""The points of a multirun, and the space of a search."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from llmtrain.compose.composing import as_hydra_wants, composed_values, register
from llmtrain.compose.explain import explain
from llmtrain.compose.typed import to_config
from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError


class Point(NamedTuple):
    """One point of a multirun: what it varies, and its config or why it has none."""

    words: list[str]
    config: RunConfig | ConfigError


@dataclass(frozen=True)
class Dimension:
    """A key and its values: ``choices`` as they are written, a range, or both for a stepped one.

    A range has both ends in it; ``step`` is null where it is continuous.
    """

    key: str
    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    is_log: bool = False
    is_whole: bool = False

    @property
    def name(self) -> str:
        """The key without Hydra's marks."""
        return self.key.lstrip("+")


class Space(NamedTuple):
    """The words that all points share, and what varies between them."""

    fixed: list[str]
    dimensions: list[Dimension]


def space_of(words: list[str]) -> Space:
    """What some words fix and what they vary; of a key that comes twice the last word counts.

    Raises ConfigError for a word that Hydra cannot read.
    """
    register()
    try:
        parsed = OverridesParser.create().parse_overrides(as_hydra_wants(words))
        last = {override.get_key_element().lstrip("+"): override for override in parsed}
        varied = [dimension_of(each) for each in last.values() if each.is_sweep_override()]
    except HydraException as error:
        raise explain(error, words) from None
    fixed = [str(each.input_line) for each in last.values() if not each.is_sweep_override()]
    return Space(fixed, varied)


def dimension_of(override: Override) -> Dimension:
    """What one word varies."""
    key, value = override.get_key_element(), override.value()
    is_log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        is_whole = isinstance(value.start, int) and isinstance(value.end, int)
        step = 1 if is_whole else None
        return Dimension(key, None, value.start, value.end, step, is_log, is_whole)
    written = tuple(override.sweep_string_iterator())
    if isinstance(value, RangeSweep) and not value.shuffle:
        low, high = sorted((float(written[0]), float(written[-1])))
        is_whole = all(number.lstrip("-").isdigit() for number in written)
        return Dimension(key, written, low, high, abs(value.step), is_log, is_whole)
    return Dimension(key, written)


def grid_points(words: list[str]) -> Iterator[Point]:
    """Every point of a grid; the last key varies fastest.

    Composing takes a tenth of a second, and a grid is often large. A hardware preset fills
    ``hardware`` alone, so each is composed once and put into the points that ask for it. Raises
    ConfigError for what is no grid.
    """
    fixed, dimensions = space_of(words)
    known: dict[tuple[str, ...], RunConfig | ConfigError] = {}
    for varied in product(*(words_of(dimension) for dimension in dimensions)):
        yield Point(list(varied), config_of_point([*fixed, *varied], known))


def words_of(dimension: Dimension) -> list[str]:
    """A word for each value."""
    if dimension.choices is None:
        ends = f"interval({dimension.low:g}, {dimension.high:g})"
        remedy = "give its values, or add sweep=search"
        raise ConfigError(dimension.name, ends, "has no end of points", remedy)
    return [f"{dimension.key}={value}" for value in dimension.choices]


def config_of_point(
    words: list[str], known: dict[tuple[str, ...], RunConfig | ConfigError]
) -> RunConfig | ConfigError:
    """A point's config, put together from those of its parts that are known."""
    on_hardware = tuple(word for word in words if word.startswith("hardware"))
    rest = tuple(word for word in words if not word.startswith("hardware"))
    has_preset = any(word.startswith("hardware=") for word in on_hardware)
    if not has_preset or any(word.startswith("experiment=") for word in rest):
        return config_or_refusal(words)
    for part in (rest, on_hardware):
        if part not in known:
            known[part] = config_or_refusal(list(part))
    config, machine = known[rest], known[on_hardware]
    if isinstance(config, ConfigError) or isinstance(machine, ConfigError):
        return config if isinstance(config, ConfigError) else machine
    return replace(config, hardware=machine.hardware)


def config_or_refusal(words: list[str]) -> RunConfig | ConfigError:
    """A point's config, or the one line that says why it has none."""
    try:
        return to_config(composed_values(words))
    except ConfigError as error:
        return error
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        return explain(error, words)
