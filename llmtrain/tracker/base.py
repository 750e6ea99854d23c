"""What every tracker gives: a line to it for one run, and how to say that it is not installed."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from llmtrain.errors import ConfigError
from llmtrain.schema import Part

Record = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """The run that a tracker is told of.

    ``id`` is what the tracker called it before, null for a new one; ``folder`` is there for the
    tracker's own files.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    id: str | None


class Line(Protocol):
    """An open line to a tracker for one run, which is called ``id`` there."""

    id: str

    def log(self, records: Sequence[Record]) -> None:
        """Records of metrics.jsonl, each with its step. A step may come again after a resume."""

    def sample(self, step: int, text: str) -> None:
        """A text that the model wrote at a step."""

    def close(self, state: str, summary: Record) -> None:
        """The run is ``done``, ``stopped`` or ``failed``; ``summary`` has the closing figures."""


@dataclass
class Tracker(Part):
    """Settings of a tracker; ``package`` is what it is imported as, ``extra`` what installs it."""

    package: ClassVar[str]
    is_on: ClassVar[bool] = True

    @property
    def remembers(self) -> bool:
        """Whether what one line was told is there when the next is opened for the same run."""
        return True

    def check_here(self) -> None:
        """Raise ConfigError where the tracker's package is not installed."""
        if importlib.util.find_spec(self.package) is None:
            reason = f"needs {self.package}, which is not installed"
            remedy = f"run: pip install -c constraints.txt -e '.[{self.kind}]'"
            raise ConfigError("tracker", self.kind, reason, remedy)

    def join(self, sweep: str) -> None:
        """Belong to a sweep, where the tracker knows groups and none was asked for."""

    def open(self, subject: Subject) -> Line:
        """Begin the run there, or go on with it. Raises whatever the tracker's package raises."""
        raise NotImplementedError


def numbers(record: Record) -> dict[str, float]:
    """The figures of a record or a summary: what can be drawn."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values as pairs of a dotted key and a value."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
