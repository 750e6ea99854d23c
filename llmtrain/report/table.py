"""The table of runs: its columns, and as CSV and Markdown."""

import csv
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtrain.report import figures
from llmtrain.report.comparison import Comparison
from llmtrain.report.differences import setting, shown
from llmtrain.report.record import Run, number

MOST_VARIED = 12  # columns of settings that a reader gets; a program gets all


@dataclass(frozen=True)
class Column:
    """One column: its name for programs, its title for people, and what a run has in it."""

    name: str
    title: str
    value: Callable[[Run], Any]
    show: Callable[[Any], str]
    is_number: bool = True
    hint: str = ""

    def cell(self, run: Run) -> str:
        """What a reader sees; nothing for what is not known."""
        value = self.value(run)
        return "" if value is None else self.show(value)

    def has_any(self, runs: list[Run]) -> bool:
        return any(self.value(run) is not None for run in runs)


TRIAL = Column("trial", "#", lambda run: run.number, str, hint="number of the trial")
NAME = Column("run", "run", lambda run: run.name, str, is_number=False)
STATE = Column("state", "state", lambda run: run.state, str, is_number=False)
ERROR = Column("error", "error", lambda run: run.error or None, str, is_number=False)

FIGURES = [
    Column(
        "eval_loss",
        "held-out",
        lambda run: run.eval_loss,
        figures.loss,
        hint="held-out loss at the end",
    ),
    Column(
        "lowest_eval_loss",
        "lowest",
        lambda run: run.lowest_eval_loss,
        figures.loss,
        hint="lowest held-out loss on the way",
    ),
    Column(
        "eval_perplexity", "perplexity", lambda run: run.final("eval_perplexity"), figures.figure
    ),
    Column(
        "eval_bits_per_byte", "bits/byte", lambda run: run.final("eval_bits_per_byte"), figures.loss
    ),
    Column(
        "train_loss",
        "training",
        lambda run: run.train_loss,
        figures.loss,
        hint="last recorded training loss",
    ),
    Column(
        "tokens_per_second",
        "tokens/s",
        lambda run: run.tokens_per_second,
        figures.count,
        hint="median of the records",
    ),
    Column("mfu", "MFU", lambda run: run.mfu, figures.percent, hint="model FLOPs utilisation"),
    Column(
        "memory_gib",
        "GiB",
        lambda run: run.memory_gib,
        figures.figure,
        hint="peak memory of a rank",
    ),
    Column("num_parameters", "parameters", lambda run: run.parameters, figures.size),
    Column("steps", "steps", lambda run: run.steps, figures.count),
    Column("tokens", "tokens", lambda run: run.tokens, figures.size),
    Column(
        "flops",
        "FLOPs",
        lambda run: run.flops,
        figures.scientific,
        hint="of training: forward and backward",
    ),
    Column("seconds", "time", lambda run: run.seconds, figures.duration, hint="spent training"),
    Column(
        "cost",
        "cost",
        lambda run: run.cost,
        figures.money,
        hint="in the currency of price_per_hour",
    ),
]


def objective_columns(comparison: Comparison) -> list[Column]:
    """A column for each objective of a sweep that no other column shows."""
    have = {column.name for column in FIGURES} | {"loss"}
    return [
        Column(
            objective.name,
            objective.title,
            lambda run, place=place: comparison.value(run, place),  # type: ignore[misc]
            figures.figure,
        )
        for place, objective in enumerate(comparison.objectives)
        if objective.name not in have
    ]


def setting_columns(comparison: Comparison) -> list[Column]:
    """A column for each key in which the runs differ."""
    return [
        setting_column(key, comparison.short[key], comparison.runs) for key in comparison.varied
    ]


def setting_column(key: str, title: str, runs: list[Run]) -> Column:
    values = [value for run in runs if (value := setting(run, key)) is not None]
    are_numbers = all(number(value) is not None for value in values)
    return Column(key, title, lambda run: setting(run, key), shown, are_numbers, hint=key)


def columns(comparison: Comparison) -> list[Column]:
    """Those that a reader gets: what has something to say."""
    told = [
        column
        for column in [*objective_columns(comparison), *FIGURES]
        if not is_idle(column, comparison.runs)
    ]
    first = [column for column in told if column.name == comparison.objective.name]
    rest = [column for column in told if column not in first]
    settings = setting_columns(comparison)[:MOST_VARIED]
    chosen = [TRIAL, NAME, STATE, *first, *settings, *rest, ERROR]
    return [column for column in chosen if column.has_any(comparison.runs)]


def is_idle(column: Column, runs: list[Run]) -> bool:
    """Whether a figure only says again what another does, or stands on no datasheet's peak."""
    if column.name == "lowest_eval_loss":
        return all(run.lowest_eval_loss == run.eval_loss for run in runs)
    if column.name == "num_parameters":
        return len(runs) > 1 and len({run.parameters for run in runs if run.parameters}) == 1
    return column.name == "mfu" and all(run.planned("peak_tflops") is None for run in runs)


def to_csv(comparison: Comparison) -> str:
    """One row a run, all columns, in full precision; nothing for what is not known."""
    chosen = [TRIAL, NAME, STATE, *setting_columns(comparison)]
    chosen += [*objective_columns(comparison), *FIGURES, ERROR]
    best = {id(run) for run in comparison.best}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(column.name for column in chosen), "is_best", "folder"])
    for run in comparison.ranked:
        cells = [as_text(column.value(run)) for column in chosen]
        is_best = "true" if id(run) in best else "false"
        writer.writerow([*cells, is_best, "" if run.path is None else os.path.normpath(run.path)])
    return text.getvalue()


def as_text(value: Any) -> str:
    """A value for a program: numbers in full."""
    return repr(value) if isinstance(value, float) else shown(value)


def to_markdown(comparison: Comparison) -> str:
    """A table for GitHub with a headline, the best run first and bold."""
    chosen = columns(comparison)
    best = {id(run) for run in comparison.best}
    lines = [
        f"## {plain(comparison.name)}",
        "",
        plain(headline(comparison)),
        "",
        row([plain(column.title) for column in chosen]),
        row(["--:" if column.is_number else "---" for column in chosen]),
    ]
    for run in comparison.ranked:
        cells = [plain(column.cell(run)) for column in chosen]
        is_best = id(run) in best
        lines.append(row([f"**{cell}**" if is_best and cell else cell for cell in cells]))
    return "\n".join(lines) + "\n"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plain(text: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    for sign in "\\`*_|[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.replace("<", "&lt;").split())


def headline(comparison: Comparison) -> str:
    """All of it in a sentence or two."""
    runs = comparison.runs
    parts = [counted(comparison)]
    if comparison.finished:
        best, objective = comparison.best[0], comparison.objective
        worth = f"{objective.title} {objective.show(comparison.value(best))}"
        parts.append(f"Best: {comparison.label(best)} with {worth}")
    parts += [text for _, text in totals(runs)]
    return ". ".join(parts) + "."


def counted(comparison: Comparison) -> str:
    """How many runs there are, and how they stand."""
    if len(comparison.runs) == 1:
        return f"1 run: {comparison.runs[0].state}"
    states = ", ".join(f"{number} {state}" for state, number in comparison.states.items())
    return f"{len(comparison.runs)} runs: {states}"


def totals(runs: list[Run]) -> list[tuple[str, str]]:
    """What all runs took together, by name; each folder once, for trials may share one."""
    once = list({run.path or id(run): run for run in runs}.values())
    sums = [
        ("tokens", total([run.tokens for run in once]), figures.size, "{} tokens"),
        ("time", total([run.seconds for run in once]), figures.duration, "{} of training"),
        ("cost", total([run.cost for run in once]), figures.money, "cost {}"),
    ]
    return [(name, text.format(show(value))) for name, value, show, text in sums if value]


def total(values: list[float | None]) -> float | None:
    """The sum of what is known; None where nothing is."""
    return sum(found) if (found := [value for value in values if value is not None]) else None
