"""How a sweep came to its best trial."""

from llmtrain.report.comparison import Comparison
from llmtrain.report.record import Run

LEAST_TRIALS = 4  # fewer can be read from the table


def progress(comparison: Comparison) -> list[tuple[int, float, Run]]:
    """The outcome of each trial that ended, in their order; none for a few trials."""
    found = [
        (run.number, value, run)
        for run in comparison.finished
        if run.number is not None and (value := comparison.value(run)) is not None
    ]
    is_told = comparison.is_sweep and len(found) >= LEAST_TRIALS
    return sorted(found, key=lambda trial: trial[0]) if is_told else []


def best_so_far(comparison: Comparison, values: list[float]) -> list[float]:
    """After each trial the best outcome up to it."""
    choose = max if comparison.objective.is_maximized else min
    best: list[float] = []
    for value in values:
        best.append(choose([value, *best[-1:]]))
    return best
