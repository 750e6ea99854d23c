"""One run as its folder tells of it; what is broken or missing is None, and said in one line."""

import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import yaml

from llmtrain.folder import RunFolder
from llmtrain.metrics import read_records
from llmtrain.status import state_of, status_of

T = TypeVar("T")

LARGEST = 1e300  # what is beyond comes of numbers that went wrong

# libyaml's is ten times as fast; a PyYAML that was built without it has the other
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """What a report needs of one run. ``path`` is None for a trial that never had a folder.

    ``config`` has dotted keys; ``named`` are those of its keys that its command line names.
    ``losses`` are the records of steps and ``evaluations`` those of held-out text, both in the
    order of steps. ``number``, ``params`` and ``values`` are those of its trial in a sweep.
    """

    name: str
    path: Path | None
    state: str
    error: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    named: frozenset[str] = frozenset()
    plan: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    losses: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    number: int | None = None
    params: dict[str, Any] | None = None
    values: list[Any] | None = None

    def planned(self, *names: str) -> float | None:
        """A number of the plan, by its name or the names that lead to it."""
        return number_at(self.plan, *names)

    def final(self, name: str) -> float | None:
        """A held-out figure at the end, or at the last evaluation of a run that has not ended."""
        last = self.evaluations[-1] if self.evaluations else {}
        found = number_at(self.summary, name) if self.state == "done" else None
        return number_at(last, name) if found is None else found

    @cached_property
    def eval_loss(self) -> float | None:
        return self.final("eval_loss")

    @cached_property
    def lowest_eval_loss(self) -> float | None:
        return min(known(self.evaluations, "eval_loss") + some(self.eval_loss), default=None)

    @cached_property
    def train_loss(self) -> float | None:
        return latest(self.losses, "loss")

    @cached_property
    def steps(self) -> float | None:
        reached = [number_at(self.status, "step"), latest(self.losses, "step")]
        return max((step for step in reached if step is not None), default=None)

    @cached_property
    def tokens(self) -> float | None:
        return product(self.steps, self.planned("tokens_per_step"))

    @cached_property
    def flops(self) -> float | None:
        """Of training so far: forward and backward, as the plan counts a token's."""
        return product(self.tokens, self.planned("flops_per_token"))

    @cached_property
    def seconds(self) -> float | None:
        return latest(self.losses, "elapsed_seconds")

    @cached_property
    def cost(self) -> float | None:
        """So far, in the price's currency; None where no price is known."""
        hours = None if self.seconds is None else self.seconds / 3600
        return product(hours, product(self.planned("world_size"), self.price_per_hour))

    @property
    def price_per_hour(self) -> float | None:
        """Of one device: as the config says, or as the plan reckoned with."""
        asked = number(self.config.get("hardware.price_per_hour"))
        return (
            asked if asked is not None else ratio(self.planned("money"), self.planned("gpu_hours"))
        )

    @cached_property
    def tokens_per_second(self) -> float | None:
        return middle(known(self.losses, "tokens_per_second"))

    @cached_property
    def mfu(self) -> float | None:
        return middle(known(self.losses, "mfu"))

    @cached_property
    def step_seconds(self) -> float | None:
        return middle(known(self.losses, "step_seconds"))

    @cached_property
    def memory_gib(self) -> float | None:
        return max(known(self.losses, "memory_gib"), default=None)

    @cached_property
    def parameters(self) -> float | None:
        return self.planned("num_parameters")


class Reading:
    """Reads files of which any may be missing or broken, and keeps a word on each that is."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """What is read; None for a file that is missing or broken."""
        try:
            return read(path) if path.exists() else None
        except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError):
            self.problems.append(f"{path.name} cannot be read")
            return None


def read_run(folder: RunFolder, now: float | None = None) -> Run:
    """A run from its folder, each file of it read once; a broken file costs only what it says."""
    reading, status = Reading(), status_of(folder)
    if status["state"] == "unreadable":
        reading.problems.append(f"{folder.status.name} cannot be read")
    records = reading.attempt(folder.metrics, read_rows) or []
    losses = in_order([row for row in records if "loss" in row])
    run = Run(
        name=folder.path.resolve().name,
        path=folder.path,
        state=guessed_state(folder, status, losses[-1] if losses else {}, now or time.time()),
        config=reading.attempt(folder.config, read_config) or {},
        named=frozenset(reading.attempt(folder.overrides, read_named) or ()),
        plan=reading.attempt(folder.plan, read_object) or {},
        status=status,
        summary=reading.attempt(folder.summary, read_object) or {},
        losses=losses,
        evaluations=in_order([row for row in records if "eval_loss" in row]),
        samples=reading.attempt(folder.samples, read_samples) or [],
    )
    said = [str(status["error"])] if status.get("error") else []
    return replace(run, error="; ".join([*said, *reading.problems]) or None)


def guessed_state(
    folder: RunFolder, status: dict[str, Any], record: dict[str, Any], now: float
) -> str:
    """The state that ``llmtrain.status`` shows."""
    seconds = {"step_seconds": number(record.get("step_seconds"))}
    try:
        return state_of(folder, status, seconds, now)
    except OSError:
        return str(status["state"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_records(path) if isinstance(row, dict)]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have a step, by it."""
    return sorted((row for row in rows if number(row.get("step")) is not None), key=step_of)


def step_of(row: dict[str, Any]) -> float:
    return float(row["step"])


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ValueError for any other."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The config with dotted keys. Raises ValueError where it is no mapping."""
    found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no mapping")
    return dict(flattened(found))


def flattened(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of nested mappings by its dotted key."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_named(path: Path) -> set[str]:
    """The keys that the run's command line names."""
    words = shlex.split(path.read_text(encoding="utf-8"))
    return {word.split("=", 1)[0].lstrip("+~") for word in words if "=" in word}


def read_samples(path: Path) -> list[dict[str, str]]:
    """The texts of the model, with the step and the prompt as they are shown."""
    names = ("step", "prompt", "text")
    rows = [row for row in read_rows(path) if {"prompt", "text"} <= set(row)]
    return [{name: str(row.get(name, "")) for name in names} for row in rows]


def number(value: Any) -> float | None:
    """A value where it is a finite number."""
    is_number = type(value) is float or type(value) is int  # a truth value is none
    return value if is_number and -LARGEST < value < LARGEST else None  # nor is a NaN


def number_at(values: Any, *names: str) -> float | None:
    """The number that names lead to through nested mappings."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return number(values)


def known(rows: list[dict[str, Any]], name: str) -> list[float]:
    """The finite numbers of that name."""
    return [value for row in rows if (value := number(row.get(name))) is not None]


def some(value: float | None) -> list[float]:
    return [] if value is None else [value]


def latest(rows: list[dict[str, Any]], name: str) -> float | None:
    """The last finite number of that name."""
    found = (value for row in reversed(rows) if (value := number(row.get(name))) is not None)
    return next(found, None)


def middle(values: list[float]) -> float | None:
    """The median without the first, which waits for compilers and caches."""
    return median(values[1:] or values) if values else None


def product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other
