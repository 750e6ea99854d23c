"""The report as a picture: loss against steps, and how the best found so far came down."""

import io
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.report.comparison import Comparison
from llmtrain.report.curves import held_out_curve, train_curve
from llmtrain.report.progress import best_so_far, progress

POINTS = 400
BEST, PLAIN, PRUNED = "#c1442e", "#1f6f8b", "#b9c0c6"


def draw(comparison: Comparison) -> bytes:
    """A PNG: loss against steps of all runs, and the best so far over a sweep's trials.

    Raises ConfigError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        remedy = "run: pip install -c constraints.txt -e '.[report]'"
        raise ConfigError("--format", "png", "needs matplotlib", remedy) from None
    has_trials = bool(progress(comparison))
    figure = Figure(figsize=(12, 4.6) if has_trials else (8, 4.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if has_trials else 1, squeeze=False)[0]
    draw_losses(panels[0], comparison)
    if has_trials:
        draw_progress(panels[1], comparison)
    figure.suptitle(comparison.name.replace("$", r"\$"), x=0.01, ha="left")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def draw_losses(panel: Any, comparison: Comparison) -> None:
    """A line for each run, the best on top; held-out loss, or of training where there is none."""
    best = comparison.best[:1]
    done = {id(run) for run in comparison.finished}
    has_held_out = any(run.evaluations for run in comparison.runs)
    for run in reversed(comparison.ranked):
        curve = held_out_curve(run, POINTS) if has_held_out else train_curve(run, POINTS)
        is_best = run in best
        colour = BEST if is_best else PLAIN if id(run) in done else PRUNED
        label = comparison.label(run).replace("$", r"\$") if is_best else None
        width, strength = (2.0, 1.0) if is_best else (0.9, max(0.15, 0.6 - len(done) / 400))
        panel.plot(*finite(curve), color=colour, lw=width, alpha=strength, label=label)
    finish(panel, "steps", "held-out loss" if has_held_out else "training loss")
    if best:
        panel.legend(frameon=False, loc="upper right", fontsize=9)


def finite(curve: dict[str, list[Any]]) -> tuple[list[float], list[float]]:
    """Steps and losses, a gap where a loss was not finite."""
    losses = [float("nan") if loss is None else loss for loss in curve["losses"]]
    return curve["steps"], losses


def draw_progress(panel: Any, comparison: Comparison) -> None:
    """Each trial's outcome as a point, and the best so far as a line."""
    trials = progress(comparison)
    numbers, values = [number for number, _, _ in trials], [value for _, value, _ in trials]
    panel.scatter(numbers, values, s=14, color=PLAIN, alpha=0.6, linewidths=0)
    so_far = best_so_far(comparison, values)
    panel.step(numbers, so_far, where="post", color=BEST, lw=1.8, label="best so far")
    finish(panel, "trial", comparison.objective.title)
    panel.legend(frameon=False, loc="best", fontsize=9)


def finish(panel: Any, x: str, y: str) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, lw=0.6)
