"""What the page's charts are drawn from, as plain values; page.js draws them."""

from typing import Any

from llmtrain.report import figures, reality
from llmtrain.report.comparison import Comparison
from llmtrain.report.curves import curve_points, held_out_curve, rounded, train_curve
from llmtrain.report.differences import setting, shown
from llmtrain.report.importance import Importance, is_logarithmic
from llmtrain.report.progress import best_so_far, progress
from llmtrain.report.record import Run, number
from llmtrain.report.scaling import PowerLaw, fit, frontier, sized_runs

MOST_AXES = 8
LEAST_LINES = 4  # fewer can be read from the table
LINE_POINTS = 60


def loss_chart(comparison: Comparison) -> dict[str, Any]:
    """A curve of training and one of held-out loss for each run that has any, the best first."""
    best = {id(run) for run in comparison.best}
    done = [id(run) for run in comparison.finished]
    most = curve_points(len(comparison.runs))
    rows = [
        {
            "row": place,
            "label": comparison.label(run),
            "state": run.state,
            "isBest": id(run) in best,
            "isDone": id(run) in done,
            "outcome": outcome(comparison, run),
            "tokensPerStep": run.planned("tokens_per_step"),
            "flopsPerToken": run.planned("flops_per_token"),
            "train": train_curve(run, most),
            "heldOut": held_out_curve(run, most),
        }
        for place, run in enumerate(comparison.ranked)
        if run.losses or run.evaluations
    ]
    return {"runs": rows} if rows else {}


def outcome(comparison: Comparison, run: Run) -> str:
    value = comparison.value(run)
    return (
        "" if value is None else f"{comparison.objective.title} {comparison.objective.show(value)}"
    )


def parallel_chart(comparison: Comparison) -> dict[str, Any]:
    """An axis for each varied setting and one for each objective; a line for each finished run.

    The best run comes last, so that its line lies on top.
    """
    done = {id(run) for run in comparison.finished}
    runs = [run for run in reversed(comparison.ranked) if id(run) in done]
    keys = [key for key in comparison.varied if differs(key, runs)][:MOST_AXES]
    if len(runs) < LEAST_LINES or not keys:
        return {}
    axes = [
        setting_axis(comparison.short[key], [setting(run, key) for run in runs]) for key in keys
    ]
    for place, objective in enumerate(comparison.objectives):
        values = [comparison.value(run, place) for run in runs]
        if None not in values:
            axes.append(
                number_axis(objective.title, [value for value in values if value is not None])
            )
    first = [comparison.cost(comparison.value(run)) for run in runs]
    return {
        "axes": axes,
        "ranks": ranks(first),
        "rows": [comparison.ranked.index(run) for run in runs],
    }


def differs(key: str, runs: list[Run]) -> bool:
    return len({shown(setting(run, key)) for run in runs}) > 1


def ranks(costs: list[float]) -> list[float]:
    """Places among the values from 0 to 1: one bad run leaves the others apart."""
    order = sorted(set(costs))
    return [order.index(cost) / max(1, len(order) - 1) for cost in costs]


def setting_axis(title: str, values: list[Any]) -> dict[str, Any]:
    """Numbers by their size, logarithmic where they spread far; anything else as names."""
    numbers = [value for value in values if number(value) is not None]
    if len(numbers) == len(values):
        return number_axis(title, numbers)
    order = sorted(
        values, key=lambda value: (number(value) is None, number(value) or 0, shown(value))
    )
    names = list(dict.fromkeys(shown(value) or "none" for value in order))
    places = [names.index(shown(value) or "none") for value in values]
    return {"title": title, "values": places, "names": names}


def number_axis(title: str, values: list[float]) -> dict[str, Any]:
    few = sorted(set(values))
    ticks = few if len(few) <= 6 else []
    return {
        "title": title,
        "values": [rounded(value) for value in values],
        "isLogarithmic": is_logarithmic(values),
        "ticks": [[value, shown(value)] for value in ticks],
    }


def importance_chart(comparison: Comparison, found: Importance) -> dict[str, Any]:
    """The shares, the largest first."""
    shares = sorted(found.shares.items(), key=lambda item: -item[1])
    names = [comparison.short[key] for key, _ in shares]
    return {"names": names, "shares": [share for _, share in shares]} if shares else {}


def progress_chart(comparison: Comparison) -> dict[str, Any]:
    """The outcome of each trial of a sweep, and the best so far."""
    trials = progress(comparison)
    values = [value for _, value, _ in trials]
    chart = {
        "title": comparison.objective.title,
        "numbers": [number for number, _, _ in trials],
        "values": [rounded(value) for value in values],
        "best": [rounded(value) for value in best_so_far(comparison, values)],
        "labels": [comparison.label(run) for _, _, run in trials],
        "isLogarithmic": is_logarithmic(values) if values else False,
    }
    return chart if trials else {}


def scaling_chart(comparison: Comparison) -> dict[str, Any]:
    """Final held-out loss against training FLOPs, with the power law where there is one."""
    runs = sized_runs(comparison)
    if not runs:
        return {}
    chosen = frontier(runs)
    law = fit([run.flops or 0.0 for run in chosen], [run.eval_loss or 0.0 for run in chosen])
    return {
        "runs": [scaling_point(comparison, run, run in chosen) for run in runs],
        "law": law_line(law, chosen) if law else {},
        "constants": law_constants(law) if law else {},
        "numSizes": len(chosen),
    }


def scaling_point(comparison: Comparison, run: Run, is_best: bool) -> dict[str, Any]:
    return {
        "label": comparison.label(run),
        "flops": run.flops,
        "loss": run.eval_loss,
        "isBest": is_best,
        "size": figures.size(run.parameters or 0.0),
    }


def law_line(law: PowerLaw, runs: list[Run]) -> dict[str, Any]:
    """The law from half the least compute to four times the most."""
    flops = [run.flops or 0.0 for run in runs]
    low, high = min(flops) / 2, max(flops) * 4
    xs = [low * (high / low) ** (place / LINE_POINTS) for place in range(LINE_POINTS + 1)]
    return {"flops": xs, "losses": [law.loss(x) for x in xs], "floor": law.floor}


def law_constants(law: PowerLaw) -> dict[str, str]:
    """The constants of L = E + A * C ** -alpha as text."""
    return {
        "floor": f"{law.floor:.3f}",
        "factor": figures.scientific(law.amplitude),
        "alpha": f"{law.alpha:.3f}",
        "between": f"{law.low:.3f} and {law.high:.3f}",
    }


def reality_chart(comparison: Comparison) -> dict[str, Any]:
    """Measured over planned for each run and measure, where there are many runs."""
    measures = reality.told(comparison.runs)
    if len(comparison.runs) < LEAST_LINES or not measures:
        return {}
    rows = [
        {
            "title": measure.title,
            "ratios": [rounded(value) for _, value in known],
            "labels": [comparison.label(run) for run, _ in known],
        }
        for measure in measures
        if (known := [(r, v) for r in comparison.ranked if (v := measure.ratio(r)) is not None])
    ]
    return {"measures": rows}
