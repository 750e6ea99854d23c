"""Curves of loss with few enough points to draw, and no spike of theirs lost."""

from bisect import bisect_left
from itertools import pairwise
from typing import Any

from llmtrain.report.record import Run, number

MOST_POINTS = 48_000  # of all curves of one kind on the page
LEAST, MOST = 60, 1200  # of one curve


def curve_points(num_runs: int) -> int:
    """How many points a curve may keep where there are so many."""
    return max(LEAST, min(MOST, MOST_POINTS // max(1, num_runs)))


def train_curve(run: Run, most: int) -> dict[str, list[Any]]:
    """Training loss: ``steps``, ``seconds`` and ``losses``, None where a loss was not finite."""
    rows = [
        (row["step"], number(row.get("elapsed_seconds")), number(row.get("loss")))
        for row in run.losses
    ]
    return as_columns(thinned(rows, most))


def held_out_curve(run: Run, most: int) -> dict[str, list[Any]]:
    """Held-out loss, timed by the records of training around it."""
    known = [
        (row["step"], seconds)
        for row in run.losses
        if (seconds := number(row.get("elapsed_seconds"))) is not None
    ]
    found = {row["step"]: number(row["eval_loss"]) for row in run.evaluations}
    rows = [(step, seconds_at(step, known), loss) for step, loss in found.items()]
    return as_columns(thinned(rows, most))


def seconds_at(step: float, known: list[tuple[float, float]]) -> float | None:
    """The time at a step, between the two records that are nearest."""
    if not known:
        return None
    after = bisect_left(known, (step, -1.0))
    if after == len(known):
        return known[-1][1]
    if after == 0:
        first_step, first_seconds = known[0]
        return first_seconds * step / first_step if first_step else first_seconds
    (low, start), (high, end) = known[after - 1], known[after]
    return start + (end - start) * (step - low) / (high - low)


def thinned(rows: list[tuple[Any, Any, Any]], most: int) -> list[tuple[Any, Any, Any]]:
    """At most so many rows: of each stretch its lowest and its highest, and both ends.

    Stretches are even on a plain axis and on a logarithmic one, half of them each.
    """
    if len(rows) <= most:
        return rows
    chosen = {0, len(rows) - 1}
    bounds = stretches(len(rows), (most - 2) // 2)
    for low, high in pairwise(bounds):
        places = [place for place in range(low, high) if rows[place][2] is not None] or [low]
        chosen.add(min(places, key=lambda place: rows[place][2] or 0.0))
        chosen.add(max(places, key=lambda place: rows[place][2] or 0.0))
    return [rows[place] for place in sorted(chosen)]


def stretches(length: int, most: int) -> list[int]:
    """Where at most so many stretches begin, and the end of the last."""
    half = max(1, most // 2)
    even = {round(length * part / half) for part in range(half + 1)}
    logarithmic = {round(length ** (part / half)) for part in range(half)}
    return sorted(even | logarithmic)


def as_columns(rows: list[tuple[Any, Any, Any]]) -> dict[str, list[Any]]:
    return {
        "steps": [row[0] for row in rows],
        "seconds": [rounded(row[1]) for row in rows],
        "losses": [rounded(row[2]) for row in rows],
    }


def rounded(value: float | None) -> float | None:
    """What an eye can tell apart: a page of 300 runs is to stay small."""
    return None if value is None else float(f"{value:.5g}")
