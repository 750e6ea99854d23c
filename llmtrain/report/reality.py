"""Plans beside what was measured: memory, seconds a step, and hours."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from llmtrain.report import figures
from llmtrain.report.record import Run, product, ratio


@dataclass(frozen=True)
class Measure:
    """Something that a plan foretells and a run shows."""

    name: str
    title: str
    planned: Callable[[Run], float | None]
    measured: Callable[[Run], float | None]
    show: Callable[[float], str]

    def ratio(self, run: Run) -> float | None:
        """Measured over planned."""
        return ratio(self.measured(run), self.planned(run))


def planned_seconds(run: Run) -> float | None:
    """The plan's time for as many steps as were taken: a run that was stopped took fewer."""
    hours = product(run.planned("total_hours"), ratio(run.steps, run.planned("num_steps")))
    return None if hours is None else hours * 3600


def seconds(value: float) -> str:
    return f"{figures.figure(value)} s"


def gib(value: float) -> str:
    return f"{figures.figure(value)} GiB"


MEASURES = [
    Measure(
        "memory",
        "memory of a rank",
        lambda run: run.planned("memory", "device_peak_gib"),
        lambda run: run.memory_gib,
        gib,
    ),
    Measure(
        "step",
        "seconds a step",
        lambda run: run.planned("step_seconds"),
        lambda run: run.step_seconds,
        seconds,
    ),
    Measure("time", "time", planned_seconds, lambda run: run.seconds, figures.duration),
]


def told(runs: list[Run]) -> list[Measure]:
    """The measures that any run has both sides of."""
    return [measure for measure in MEASURES if any(measure.ratio(run) for run in runs)]


def summary(measure: Measure, runs: list[Run]) -> str:
    """The median over all runs of measured over planned."""
    ratios = [found for run in runs if (found := measure.ratio(run)) is not None]
    return f"{median(ratios):.2f}" if ratios else ""
