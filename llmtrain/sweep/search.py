"""A search: the next point depends on how the earlier ones turned out."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from llmtrain.errors import ConfigError
from llmtrain.schema import unlearned, unlearned_part
from llmtrain.sweep.grid import Grid


class Sampler(Enum):
    tpe = "tpe"
    random = "random"
    grid = "grid"
    cmaes = "cmaes"
    qmc = "qmc"
    gp = "gp"
    nsgaii = "nsgaii"


class Pruner(Enum):
    none = "none"
    median = "median"
    halving = "halving"
    hyperband = "hyperband"


@dataclass
class Search(Grid):
    """``num_trials`` points of the space ``params``, as ``sampler`` chooses them.

    ``params`` are keys or groups and their values in Hydra's words: ``interval(1e-4, 1e-2)``,
    ``tag(log, interval(...))``, ``int(interval(1, 8))``, ``range(1, 9, step=2)`` or ``a, b, c``;
    the command line's go before them. ``pruner`` ends a trial that falls behind, by its held-out
    records. The options go to the Optuna class of that sampler or pruner.
    """

    kind: str = "search"
    searches: ClassVar[bool] = True
    name: str = unlearned("search")
    num_trials: int = unlearned(20, low=1)
    seed: int = unlearned(0, low=0)
    sampler: Sampler = unlearned(Sampler.tpe)
    sampler_options: dict[str, Any] = unlearned_part(dict)
    pruner: Pruner = unlearned(Pruner.median)
    pruner_options: dict[str, Any] = unlearned_part(dict)
    params: dict[str, Any] = unlearned_part(dict)

    def check(self) -> None:
        """Raise ConfigError for what contradicts itself."""
        super().check()
        if len(self.goals) > 1 and self.sampler is Sampler.cmaes:
            remedy = "take tpe, nsgaii, qmc or random"
            raise ConfigError("sweep.sampler", "cmaes", "knows one objective only", remedy)

    @property
    def prunes(self) -> bool:
        """Optuna's pruners know one objective only."""
        return self.pruner is not Pruner.none and len(self.goals) == 1
