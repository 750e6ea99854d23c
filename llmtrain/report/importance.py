"""How much each varied setting decides about the outcome, by PED-ANOVA."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

from llmtrain.report.comparison import Comparison
from llmtrain.report.differences import setting, shown
from llmtrain.report.record import Run, number

LEAST_RUNS = 8
LEAST_TOP = 3  # runs that count as good, where a tenth of all would be fewer


@dataclass(frozen=True)
class Importance:
    """A share of each setting, summing to 1; or why there is none. ``num_top`` runs were good."""

    shares: dict[str, float]
    num_top: int = 0
    reason: str | None = None


def importance(comparison: Comparison) -> Importance:
    """What sets the best runs apart from the rest (PED-ANOVA, Watanabe et al. 2023)."""
    runs = [run for run in comparison.finished if run.state == "done"]
    keys = [key for key in comparison.varied if is_everywhere(key, runs)]
    if len(comparison.runs) < 2 or not comparison.varied:
        return Importance({})
    if len(runs) < LEAST_RUNS:
        return Importance({}, reason=f"needs {LEAST_RUNS} finished runs; there are {len(runs)}")
    if len(keys) < 2:
        return Importance({}, reason="needs two settings that differ and that every run has")
    try:
        return measured(comparison, runs, keys)
    except ImportError:
        return Importance({}, reason="needs optuna: pip install -c constraints.txt -e '.[sweep]'")


def is_everywhere(key: str, runs: list[Run]) -> bool:
    """Whether all have a setting and some differ in it."""
    values = [setting(run, key) for run in runs]
    return None not in values and len({shown(value) for value in values}) > 1


def measured(comparison: Comparison, runs: list[Run], keys: list[str]) -> Importance:
    """The shares by optuna, on a study in memory that is made of the runs."""
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    quantile = max(0.1, min(0.5, LEAST_TOP / len(runs)))
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the evaluator is experimental
            study = study_of(comparison, runs, keys)
            evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)
            shares = get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError) as error:
        return Importance({}, reason=f"optuna finds none ({str(error).splitlines()[0]})")
    finally:
        optuna.logging.set_verbosity(before)
    if not any(share > 0 and math.isfinite(share) for share in shares.values()):
        return Importance({}, reason="no setting sets the best runs apart")
    return Importance(
        {key: float(share) for key, share in shares.items()}, math.ceil(quantile * len(runs))
    )


def study_of(comparison: Comparison, runs: list[Run], keys: list[str]) -> Any:
    """The runs as finished trials of a study."""
    import optuna

    direction = optuna.study.StudyDirection(2 if comparison.objective.is_maximized else 1)
    study = optuna.create_study(direction=direction)
    space = {key: distribution([setting(run, key) for run in runs]) for key in keys}
    for run in runs:
        params = {key: plain(setting(run, key), space[key]) for key in keys}
        value = comparison.value(run)
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=value))
    return study


def distribution(values: list[Any]) -> Any:
    """Where a setting came from: a stretch of numbers, logarithmic if it is long, or choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if any(number(value) is None for value in values):
        return CategoricalDistribution(list(dict.fromkeys(map(shown, values))))
    return FloatDistribution(min(values), max(values), log=is_logarithmic(values))


def plain(value: Any, space: Any) -> Any:
    from optuna.distributions import FloatDistribution

    return float(value) if isinstance(space, FloatDistribution) else shown(value)


def is_logarithmic(values: list[float]) -> bool:
    """Whether positive numbers spread so far that their ratios matter."""
    return min(values) > 0 and max(values) / min(values) >= 8
