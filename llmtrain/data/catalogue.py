"""The catalogue: data sets that others published, each a YAML in conf/data."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from llmtrain.errors import ConfigError, nearest
from llmtrain.schema import unlearned

CONF = Path(__file__).resolve().parents[2] / "conf"
SIZE = re.compile(r"(\d+(?:\.\d+)?)([mbt])")
UNITS = {"m": 1e6, "b": 1e9, "t": 1e12}
OPTIMAL_TOKENS = 20  # a parameter (Hoffmann et al. 2022)
MOST_EPOCHS = 4  # more passes over the same text teach little (Muennighoff et al. 2023)


class RowFormat(Enum):
    """``text`` is learned whole, for pretraining; of ``sft`` rows the answers are learned."""

    text = "text"
    sft = "sft"


@dataclass
class Published:
    """What is known of a data set: where it is to be had, how large it is, what one may do with it.

    ``files`` are the patterns of those that hold its training data; ``modelscope`` is a copy with
    the same files on ModelScope. ``num_tokens`` were counted with ``counted_with``; an estimate is
    what was not published, or not found. A ``licence`` that is not clear is left to the page. A
    ``gated`` set wants its terms to be accepted there.
    """

    hub: str = "???"
    revision: str = "main"
    files: list[str] = field(default_factory=list)
    title: str = unlearned("???")
    modelscope: str | None = unlearned()
    gated: bool = unlearned(False)
    format: RowFormat = unlearned(RowFormat.text)
    language: str = unlearned("???")
    licence: str = unlearned("???")
    download_gib: float = unlearned("???", above=0)
    size_is_estimate: bool = unlearned(True)
    num_tokens: float = unlearned("???", above=0)
    tokens_are_estimate: bool = unlearned(True)
    counted_with: str = unlearned("???")
    suits: str = unlearned("???")

    @property
    def page(self) -> str:
        """Its page, which has the licence and the terms."""
        return f"https://huggingface.co/datasets/{self.hub}"

    def holds(self, name: str) -> bool:
        """Whether a file of this relative path is one of its training data."""
        return any(fnmatch(name, pattern) for pattern in self.files)


class Entry(NamedTuple):
    """A data set by the name under which ``data=<name>`` chooses it."""

    name: str
    published: Published


@cache
def entries() -> tuple[Entry, ...]:
    """Every data set of the catalogue, sorted by name. Only YAML is read."""
    return tuple(read_entries())


def read_entries() -> Iterator[Entry]:
    for path in sorted((CONF / "data").glob("*.yaml")):
        block = read_yaml(path).get("published")
        if block is not None:
            found: Any = OmegaConf.merge(OmegaConf.structured(Published), block)
            yield Entry(path.stem, OmegaConf.to_object(found))  # type: ignore[arg-type]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML of conf/ as it stands: pointers and defaults are not followed."""
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return dict(values)


def find_entry(name: str, key: str = "data") -> Entry:
    """A data set by its name; ConfigError, naming ``key``, for one that is not in the catalogue."""
    known = {entry.name: entry for entry in entries()}
    if name not in known:
        remedy = f"{nearest(name, known)}; python -m llmtrain.data list has all"
        raise ConfigError(key, name, "is not in the catalogue", remedy)
    return known[name]


def default_folder(name: str) -> Path:
    """Where a data set lies unless one says otherwise: in the cache."""
    root = str(OmegaConf.load(CONF / "config.yaml").cache_root)
    return Path(root).expanduser() / "datasets" / name


def parse_size(text: str) -> float | None:
    """A number such as 350m, 1.3b or 2t; None for another word."""
    match = SIZE.fullmatch(text.lower())
    return float(match[1]) * UNITS[match[2]] if match else None


def show_count(number: float) -> str:
    """A number of tokens or parameters in the unit in which people say it."""
    unit = "t" if number >= 1e12 else "b" if number >= 1e9 else "m"
    return f"{number / UNITS[unit]:.3g}{unit.upper()}"
