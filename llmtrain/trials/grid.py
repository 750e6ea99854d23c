"""The trials of a grid: all its points, in their order."""

from typing import Any

from llmtrain.compose.points import Space, grid_points
from llmtrain.errors import ConfigError
from llmtrain.trials.record import Trial


class GridTrials:
    """Gives each point once; none depends on how another turned out.

    Raises ConfigError for the first point that is no experiment: a slip of the pen is better heard
    of before the others are trained.
    """

    def __init__(self, words: list[str], space: Space) -> None:
        points = list(grid_points(words))
        for point in points:
            if isinstance(point.config, ConfigError):
                raise point.config
        self.trials = [
            trial_of(number, [*space.fixed, *point.words], point.words, point.config)
            for number, point in enumerate(points)
        ]
        refuse_twins(self.trials)
        self.left = iter(self.trials)

    def next(self) -> Trial | None:
        """The next that is to run; None when all were given."""
        return next(self.left, None)

    def ended(self, trial: Trial) -> None:
        """Nothing follows from an end."""

    def is_hopeless(self, trial: Trial) -> bool:
        return False

    def close(self) -> None:
        """Nothing is held."""


def trial_of(number: int, words: list[str], varied: list[str], config: Any) -> Trial:
    """A trial of a point; refused at once where that has no config."""
    pairs = (word.lstrip("+").partition("=") for word in varied)
    trial = Trial(number, words, {key: number_in(value) for key, _, value in pairs})
    if isinstance(config, ConfigError):
        trial.refuse(str(config))
    else:
        trial.config = config
    return trial


def number_in(text: str) -> Any:
    """A value as it is written, as a number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def refuse_twins(trials: list[Trial]) -> None:
    """Refuse a point that would land in another's folder."""
    seen: set[str] = set()
    for trial in trials:
        if trial.config is None:
            continue
        name = trial.config.run_name
        if name in seen:
            reason = "is the name of two points that learn the same"
            remedy = "vary name too, or what is learned"
            trial.refuse(str(ConfigError("name", trial.config.name, reason, remedy)))
            trial.config = None
        seen.add(name)
