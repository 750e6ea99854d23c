"""The Hydra door: composes a command line, and says Hydra's errors in our one line."""

import os
import sys
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from llmtrain.compose.composing import (
    CONF,
    as_hydra_wants,
    choices,
    command_line,
    groups,
    register,
    searched,
)
from llmtrain.compose.explain import explain
from llmtrain.compose.points import Point, grid_points
from llmtrain.compose.typed import composed, to_config
from llmtrain.config import RunConfig
from llmtrain.errors import (
    DONE,
    FAILED,
    REFUSED,
    STOPPED,
    ConfigError,
    TrainingError,
    is_disk_full,
)

__all__ = ["Point", "choices", "composed", "grid_points", "main", "overrides", "report"]

SEARCH = "hydra/sweeper=optuna"  # says it as well as sweep=search

Task = Callable[[RunConfig], float | None]
Multirun = Callable[[list[str]], int]


def main(task: Task, command: str, summary: str, multirun: Multirun | None = None) -> int:
    """Compose the command line into a config, hand it to ``task``, and return the exit code.

    A whole number that ``task`` returns is the exit code. The words of a multirun go to
    ``multirun``, which returns it.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(command, summary))
        return DONE
    asked = Asked()
    try:
        compose_command_line(asked)
        if asked.multirun is not None:
            return run_points(asked.multirun, multirun)
        if asked.single is not None:
            code = task(to_config(asked.single))
            return code if isinstance(code, int) else DONE
    except (ConfigError, TrainingError) as error:
        return report(error)
    except OSError as error:
        if not is_disk_full(error):
            raise
        return report(TrainingError(f"{error}. Make room: the same command continues."))
    except KeyboardInterrupt:
        print("Stopped before training began.", file=sys.stderr)
        return STOPPED
    return DONE


class Asked:
    """What the command line asks for: the values of a single run, or the words of a multirun.

    Hydra calls it with the first, and our sweeper leaves the second here. Both are run after Hydra
    has returned, so that errors are ours alone.
    """

    def __init__(self) -> None:
        self.single: DictConfig | None = None
        self.multirun: list[str] | None = None
        self.has_strange_sweeper = False

    def __call__(self, values: DictConfig) -> None:
        self.has_strange_sweeper = HydraConfig.get().mode == RunMode.MULTIRUN
        self.single = values


def run_points(words: list[str], multirun: Multirun | None) -> int:
    """Run the points of a multirun, where the command can."""
    if multirun is None:
        raise ConfigError("-m", " ".join(words), "is more than one", "leave -m out")
    return multirun(words)


def report(error: ConfigError | TrainingError) -> int:
    """Print one line and give the exit code that belongs to it."""
    print(error, file=sys.stderr)
    return REFUSED if isinstance(error, ConfigError) else FAILED


def compose_command_line(asked: Asked) -> None:
    """Run Hydra; whatever it raises over a command line is a mistake in it."""
    words = sys.argv[1:]
    try:
        run_hydra(asked)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise explain(error, words) from None
    if asked.has_strange_sweeper:
        remedy = "leave it out: -m alone is a grid, and sweep=... a search"
        raise ConfigError("hydra/sweeper", "basic", "does not run points of ours", remedy)


def run_hydra(task: Callable[[DictConfig], None]) -> None:
    """Let Hydra compose the command line and call ``task`` with it."""
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors to us instead of printing them
    words = as_hydra_wants(command_line())
    if SEARCH in words and not any(word.startswith("sweep=") for word in words):
        words.append("sweep=search")
    sys.argv[1:] = sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # goes first
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()


def help_text(command: str, summary: str) -> str:
    """What ``--help`` prints: the use, every group and each of its choices."""
    lines = [f"  {group}: {', '.join(choices(group))}" for group in groups()]
    return "\n".join(
        [
            summary,
            f"\nUse: python -m llmtrain.{command} [GROUP=CHOICE ...] [KEY=VALUE ...] [-m]\n",
            "Groups and their choices:",
            *lines,
            "\n--cfg job     print the composed config (with --resolve: values, not pointers)",
            "-m            multirun: KEY=A,B runs a point for each value, each in its own folder;",
            "              with sweep=NAME a search",
        ]
    )


def overrides() -> list[str]:
    """The overrides of the run, and where else than in conf/ they were looked up."""
    if HydraConfig.initialized():
        return [*searched(), *HydraConfig.get().overrides.task]
    return command_line()
