"""Hydra's door to a multirun of ours: it hands over the words of all points and runs none."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Points(Sweeper):
    """Gives the words of a multirun to the task, which runs the points when Hydra has returned.

    ``params`` are words of a config file, ``{key: values}``; those of the command line go before.
    """

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.params = dict(params or {})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.asked: Any = task_function

    def sweep(self, arguments: list[str]) -> None:
        self.asked.multirun = [
            *(f"{key}={value}" for key, value in self.params.items()),
            *arguments,
        ]
