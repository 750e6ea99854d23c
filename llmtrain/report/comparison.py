"""The runs that a report is about, what tells them apart, and which of them is the best."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.folder import RunFolder
from llmtrain.report import figures
from llmtrain.report.differences import setting, short_names, shown, varied_keys
from llmtrain.report.record import Run, number, read_object, read_run
from llmtrain.status import runs_below

SWEEP = "sweep.json"
TITLES = {
    "eval_loss": "held-out loss",
    "eval_perplexity": "perplexity",
    "eval_bits_per_byte": "bits per byte",
    "loss": "training loss",
    "train_loss": "training loss",
    "tokens_per_second": "tokens/s",
    "memory_gib": "memory (GiB)",
}
MOST_WORDS = 6
FIGURES = {"loss": "train_loss", "elapsed_seconds": "seconds"}  # records' names beside a run's own


@dataclass(frozen=True)
class Objective:
    """What makes a run better: a figure, and whether more of it is."""

    name: str
    is_maximized: bool = False

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    def show(self, value: float | None) -> str:
        """Its value as text: losses to the digits that tell runs apart."""
        is_fine = "loss" in self.name or "bits" in self.name
        return "" if value is None else figures.loss(value) if is_fine else figures.figure(value)

    def figure(self, run: Run) -> float | None:
        """What the run's own folder says of it."""
        if self.name.startswith("eval_"):
            return run.final(self.name)
        return number(getattr(run, FIGURES.get(self.name, self.name), None))


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other. ``place`` is the folder that a report goes to unless told."""

    name: str
    place: Path
    runs: list[Run]
    objectives: list[Objective]
    is_sweep: bool

    @cached_property
    def varied(self) -> list[str]:
        """The keys in which the runs differ."""
        return varied_keys(self.runs)

    @cached_property
    def short(self) -> dict[str, str]:
        """The varied keys in a word each."""
        return short_names(self.varied)

    @property
    def objective(self) -> Objective:
        """By which runs are put in order: the first."""
        return self.objectives[0]

    def value(self, run: Run, place: int = 0) -> float | None:
        """A run's figure of an objective; the sweep's own where it has one."""
        if run.values and len(run.values) > place:
            return number(run.values[place])
        return self.objectives[place].figure(run)

    @cached_property
    def finished(self) -> list[Run]:
        """Runs that can be compared at their end; those that got anywhere, where none is done."""
        valued = [run for run in self.runs if self.value(run) is not None]
        return [run for run in valued if run.state == "done"] or valued

    @cached_property
    def ranked(self) -> list[Run]:
        """All runs, the best first; then those that did not end, and those without a figure."""
        done = {id(run) for run in self.finished}

        def order(run: Run) -> tuple[bool, bool, float]:
            value = self.value(run)
            return id(run) not in done, value is None, self.cost(value)

        return sorted(self.runs, key=order)

    def cost(self, value: float | None, place: int = 0) -> float:
        """An objective's value as something to keep low."""
        sign = -1 if self.objectives[place].is_maximized else 1
        return 0.0 if value is None else sign * value

    @cached_property
    def best(self) -> list[Run]:
        """The best run; with several objectives all that no other beats in each, best first."""
        costs = {id(run): costs for run in self.finished if (costs := self.costs(run)) is not None}
        if len(self.objectives) == 1 or not costs:
            return self.ranked[:1] if self.finished else []
        return [
            run
            for run in self.ranked
            if id(run) in costs and not any(beats(c, costs[id(run)]) for c in costs.values())
        ]

    def costs(self, run: Run) -> list[float] | None:
        """All objectives of a run, each to keep low; None where one is missing."""
        values = [self.value(run, place) for place in range(len(self.objectives))]
        if any(value is None for value in values):
            return None
        return [self.cost(value, place) for place, value in enumerate(values)]

    def settings(self, run: Run) -> dict[str, str]:
        """What tells a run from the others, in short names."""
        found = {self.short[key]: shown(setting(run, key)) for key in self.varied}
        return {name: value for name, value in found.items() if value}

    def label(self, run: Run) -> str:
        """A run in a few words: what differs, or its name where that would take many."""
        settings = self.settings(run)
        words = " ".join(f"{name}={value}" for name, value in settings.items())
        number = "" if run.number is None else f"#{run.number} "
        return number + (words if 0 < len(settings) <= MOST_WORDS else run.name)

    @property
    def states(self) -> dict[str, int]:
        """How many runs are in each state, the most frequent first."""
        return dict(Counter(run.state for run in self.runs).most_common())


def beats(one: list[float], other: list[float]) -> bool:
    """Whether nothing is worse and something is better."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def compare(paths: list[Path]) -> Comparison:
    """The runs of sweeps and folders. Raises ConfigError for a path that leads to none."""
    for path in paths:
        if not path.is_dir():
            raise ConfigError("path", path, "does not exist", "give folders of runs or of a sweep")
    sweeps = {path: read_sweep(path) for path in paths if (path / SWEEP).exists()}
    only = len(paths) == 1 and paths[0] in sweeps
    runs = [run for path in paths for run in runs_of(path, sweeps.get(path))]
    runs = runs if only else side_by_side(runs)
    if not runs:
        raise ConfigError("path", paths[0], "holds no runs", "give folders of runs or of a sweep")
    place = paths[0]
    objectives = objectives_of(sweeps[place]) if only else []
    name = str(sweeps[place].get("name") or place.resolve().name) if only else name_of(paths, runs)
    return Comparison(name, place, runs, objectives or default_objectives(runs), only)


def side_by_side(runs: list[Run]) -> list[Run]:
    """Runs that are not of one sweep alone: each folder once, compared by its config."""
    plain = [replace(run, number=None, params=None, values=None) for run in runs]
    return list({run.path.resolve() if run.path else id(run): run for run in plain}.values())


def name_of(paths: list[Path], runs: list[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    return paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs"


def read_sweep(path: Path) -> dict[str, Any]:
    """What a sweep's folder says of it. Raises ConfigError where that is broken."""
    try:
        return read_object(path / SWEEP)
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({str(error).splitlines()[0]})"
        raise ConfigError("path", path / SWEEP, reason, "give the folders of its runs") from None


def objectives_of(sweep: dict[str, Any]) -> list[Objective]:
    found = sweep.get("objectives")
    given = found if isinstance(found, dict) else {}
    return [Objective(str(name), str(way).startswith("max")) for name, way in given.items()]


def default_objectives(runs: list[Run]) -> list[Objective]:
    """Held-out loss; bits per byte where vocabularies differ and losses of a token say nothing."""
    if all(run.eval_loss is None for run in runs):
        return [Objective("loss")]
    vocabularies = {run.planned("vocab_size") for run in runs if run.eval_loss is not None}
    return [Objective("eval_bits_per_byte" if len(vocabularies) > 1 else "eval_loss")]


def runs_of(path: Path, sweep: dict[str, Any] | None) -> Iterator[Run]:
    """The runs of a sweep's trials, or all below a folder by their names."""
    if sweep is not None:
        yield from trials_of(path, sweep)
        return
    now = time.time()
    folders = sorted(runs_below(path), key=lambda folder: str(folder.path))
    if not folders and RunFolder(path).exists():
        folders = [RunFolder(path)]  # it was filled, and never came to say how it is
    yield from (read_run(folder, now) for folder in folders)


def trials_of(path: Path, sweep: dict[str, Any]) -> Iterator[Run]:
    """A run for each trial; trials of one folder share what is read of it."""
    trials, now = sweep.get("trials"), time.time()
    seen: dict[str, Run] = {}
    for trial in trials if isinstance(trials, list) else []:
        if not isinstance(trial, dict):
            continue
        folder = trial.get("folder")
        if isinstance(folder, str) and folder not in seen:
            seen[folder] = read_run(RunFolder(path / folder), now)
        yield run_of_trial(trial, seen.get(folder) if isinstance(folder, str) else None)


def run_of_trial(trial: dict[str, Any], run: Run | None) -> Run:
    """A trial's run, in the words of the sweep where these say more than the folder's."""
    place = number(trial.get("number"))
    found = run or Run(f"trial {place}", None, "")
    params, values = trial.get("params"), trial.get("values")
    return replace(
        found,
        state=state_of_trial(trial, run),
        error=str(trial["error"]) if trial.get("error") else found.error,
        number=None if place is None else int(place),
        params=params if isinstance(params, dict) else {},
        values=values if isinstance(values, list) else None,
    )


def state_of_trial(trial: dict[str, Any], run: Run | None) -> str:
    """The sweep knows what was pruned; the folder, whether a run that is said to run does."""
    said = str(trial.get("state") or "")
    if run is not None and said in ("", "running"):
        return run.state
    return said or "unknown"
