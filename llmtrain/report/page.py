"""The report as one HTML file that needs no network: template, style, script and data in it."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmtrain.errors import ConfigError
from llmtrain.report import charts, figures, reality, table
from llmtrain.report.comparison import Comparison
from llmtrain.report.faults import faults
from llmtrain.report.importance import Importance, importance
from llmtrain.report.record import Run
from llmtrain.report.samples import samples
from llmtrain.report.table import Column

HERE = Path(__file__).parent
REMEDY = "run: pip install -c constraints.txt -e '.[report]'"
MOST_PLANS = 12  # rows of plans that are shown unasked


def render(comparison: Comparison, out: Path) -> str:
    """The page, with links that lead from where it will lie. Raises ConfigError without plotly."""
    environment, plotly = template_engine(), plotly_source()
    found = importance(comparison)
    drawn = all_charts(comparison, found)
    return environment.get_template("page.html").render(
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        plotly=plotly if any(drawn.values()) else "",
        charts=drawn,
        comparison=comparison,
        counted=table.counted(comparison),
        tiles=tiles(comparison),
        notes=notes(comparison),
        table=rows(comparison, out),
        columns=table.columns(comparison),
        faults=faults(comparison),
        left_out=max(0, len(comparison.varied) - table.MOST_VARIED),
        importance=found,
        samples=samples(comparison),
        plans=plan_rows(comparison),
        written=datetime.now().strftime("%d %B %Y, %H:%M").lstrip("0"),
    )


def template_engine() -> Any:
    """What fills the template and escapes whatever it is given."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise ConfigError("--format", "html", "needs jinja2", REMEDY) from None
    loader = FileSystemLoader(HERE)
    return Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def plotly_source() -> str:
    """plotly.js as the installed package brings it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("--format", "html", "needs plotly", REMEDY) from None
    return str(get_plotlyjs())


def all_charts(comparison: Comparison, found: Importance) -> dict[str, Any]:
    """By the section that each is drawn in; an empty one is left out of the page."""
    return {
        "loss": charts.loss_chart(comparison),
        "progress": charts.progress_chart(comparison),
        "parallel": charts.parallel_chart(comparison),
        "importance": charts.importance_chart(comparison, found),
        "scaling": charts.scaling_chart(comparison),
        "reality": charts.reality_chart(comparison),
    }


def tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The figures at the top: a name, a figure, and a word on it."""
    found = best_tiles(comparison) if comparison.finished else []
    runs = comparison.runs
    once = list({run.path or id(run): run for run in runs}.values())
    tokens, seconds, cost = (
        table.total([getattr(run, name) for run in once]) for name in ("tokens", "seconds", "cost")
    )
    if tokens:
        found.append(("tokens", figures.size(tokens), "seen in training"))
    if seconds:
        found.append(("time", figures.duration(seconds), "of training"))
    if cost is not None:
        found.append(("cost", figures.money(cost), "at the planned price"))
    return found


def best_tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """What the best run attained."""
    best, objective = comparison.best[0], comparison.objective
    figure = objective.show(comparison.value(best))
    whose = "of the best run" if len(comparison.runs) > 1 else "at the end"
    found = [(objective.title, figure, whose)]
    others = [("eval_perplexity", "perplexity", figures.figure)]
    others += [("eval_bits_per_byte", "bits per byte", figures.loss)]
    for name, title, show in others:
        other = best.final(name)
        if other is not None and name != objective.name:
            found.append((title, show(other), "of held-out text"))
    return found


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know so as not to misread the figures."""
    found = []
    if comparison.objective.name == "eval_bits_per_byte" and not comparison.is_sweep:
        found.append(
            "Vocabularies differ, and with them what a token is: runs are ranked by bits per byte."
        )
    if comparison.finished and all(run.state != "done" for run in comparison.finished):
        found.append("No run has ended yet: figures are of the last evaluation so far.")
    return found


def rows(comparison: Comparison, out: Path) -> list[dict[str, Any]]:
    """The table's rows, the best run first."""
    chosen = table.columns(comparison)
    best = {id(run) for run in comparison.best} if len(comparison.runs) > 1 else set()
    return [
        {
            "cells": [cell(column, run) for column in chosen],
            "is_best": id(run) in best,
            "state": run.state,
            "link": link(run, out),
        }
        for run in comparison.ranked
    ]


def cell(column: Column, run: Run) -> dict[str, Any]:
    """A cell's text, and what it is sorted by."""
    value = column.value(run)
    key = value if column.is_number else column.cell(run).lower()
    return {"text": column.cell(run), "key": "" if value is None else key, "column": column}


def link(run: Run, out: Path) -> str:
    """From the page to the run's folder."""
    if run.path is None:
        return ""
    return quote(os.path.relpath(run.path.resolve(), out.resolve().parent)) + "/"


def plan_rows(comparison: Comparison) -> dict[str, Any]:
    """Planned and measured figures: the median of all runs, and those of each."""
    measures = reality.told(comparison.runs)
    runs = [run for run in comparison.ranked if any(measure.ratio(run) for measure in measures)]
    return {
        "measures": [
            {"title": measure.title, "median": reality.summary(measure, runs)}
            for measure in measures
        ],
        "rows": [
            {"name": comparison.label(run), "cells": [sides(measure, run) for measure in measures]}
            for run in runs
        ],
        "is_long": len(runs) > MOST_PLANS,
    }


def sides(measure: reality.Measure, run: Run) -> dict[str, str]:
    """Planned, measured and their ratio, as text."""
    planned, measured, over = measure.planned(run), measure.measured(run), measure.ratio(run)
    return {
        "planned": "" if planned is None else measure.show(planned),
        "measured": "" if measured is None else measure.show(measured),
        "ratio": "" if over is None else f"{over:.2f}",
    }
