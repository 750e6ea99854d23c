"""The words that the tables are written in: what a key of another trainer becomes here."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


def same(value: Any) -> Any:
    return value


def one(value: Any) -> Any:
    """A value that is no list and no mapping."""
    if isinstance(value, list | dict):
        raise TypeError
    return value


def several(value: Any) -> list[Any]:
    """A list, or what stands for one: words between commas or spaces."""
    if isinstance(value, dict):
        raise TypeError
    return value if isinstance(value, list) else str(value).replace(",", " ").split()


@dataclass(frozen=True)
class To:
    """A key of ours, or the choice of a group.

    ``read`` turns the value into ours, or into None for nothing. ``but`` says in what the meaning
    differs.
    """

    key: str
    read: Callable[[Any], Any] = same
    but: str = ""


@dataclass(frozen=True)
class Term:
    """One of several values that make a setting together (see ``combine``)."""

    name: str
    read: Callable[[Any], Any] = one


@dataclass(frozen=True)
class Within:
    """Settings of another format: a mapping, or the path of a file that holds it."""

    format: "Format"


@dataclass(frozen=True)
class Lost:
    """No counterpart, and a run is another without it; ``instead`` is what can be done."""

    instead: str


@dataclass(frozen=True)
class Needless:
    """No counterpart, and none is needed."""

    because: str


Entry = To | Term | Within | Lost | Needless
Table = dict[str, Entry]


@dataclass(frozen=True)
class Format:
    """One trainer's settings. A file that has one of the ``marks`` as a key is of this format.

    ``table`` says what becomes of each key; dots lead into mappings, and ``a.*`` is whatever is not
    named within ``a``. ``defaults`` are what the trainer takes for keys that a file leaves out.
    ``unsaid`` are further values that it takes, and that need no word. ``asks`` are words that
    a run needs beside, which such a file cannot say.
    """

    name: str
    marks: frozenset[str]
    table: Table
    defaults: dict[str, Any] = field(default_factory=dict)
    unsaid: dict[str, Any] = field(default_factory=dict)
    asks: tuple[str, ...] = ()


class Given(NamedTuple):
    """A value as a file gives it, or as its trainer takes it where the file says nothing.

    ``raw`` is how it was written, where that is not the value.
    """

    key: str
    value: Any
    is_default: bool
    raw: Any = None

    @property
    def words(self) -> str:
        """The value with its key, as a comment tells it."""
        written = self.value if self.raw is None else self.raw
        return f"{self.key}={shown(written)}" + (" (its default)" if self.is_default else "")


class Setting(NamedTuple):
    """A value of ours, what it was made of, and in what its meaning differs."""

    value: Any
    source: str
    but: str = ""
    is_default: bool = False


class Left(NamedTuple):
    """A value that was not taken over; ``is_lost`` where the run is another without it."""

    key: str
    value: Any
    why: str
    is_lost: bool


Terms = dict[str, Given]


def shown(value: Any) -> str:
    """A value in a line of text, cut where it is long."""
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    text = " ".join(str(value).split())
    text = text.removesuffix(".0") if isinstance(value, float) else text
    return text if len(text) <= 40 else f"{text[:37]}..."


class Ask(NamedTuple):
    """A word that the command needs beside the experiment."""

    word: str


@dataclass(frozen=True)
class Case:
    """What a file does not say: the folder that its paths are seen from, and how many processes."""

    folder: Path
    num_processes: int


Made = Iterator[tuple[str, Setting] | Left | Ask]


def is_off(value: Any) -> bool:
    """Whether a value says that nothing is wanted, or that somebody else decides."""
    return value in (None, False, "", "auto", "no", "none", "None", 0, -1) or value in (
        [],
        {},
        [""],
    )


def sources(given: Iterable[Given]) -> str:
    """What a setting was made of, for its comment."""
    return ", ".join(each.words for each in given)


def switched_on(terms: Terms, names: Iterable[str]) -> list[Given]:
    """Those of some terms that a file has and that say yes."""
    return [terms[name] for name in names if name in terms and not is_off(terms[name].value)]
