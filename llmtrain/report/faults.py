"""What went wrong, each fault once with the runs that it met."""

from dataclasses import dataclass

from llmtrain.report.comparison import Comparison

MOST_FAULTS = 8
MOST_NAMES = 3


@dataclass(frozen=True)
class Fault:
    """What was said, how many runs it met, and some of them."""

    error: str
    num_runs: int
    labels: list[str]


def faults(comparison: Comparison) -> list[Fault]:
    """The most frequent faults first."""
    met: dict[str, list[str]] = {}
    for run in comparison.ranked:
        if run.error:
            met.setdefault(run.error, []).append(comparison.label(run))
    found = [Fault(error, len(labels), labels[:MOST_NAMES]) for error, labels in met.items()]
    return sorted(found, key=lambda fault: -fault.num_runs)[:MOST_FAULTS]
