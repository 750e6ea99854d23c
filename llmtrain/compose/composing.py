"""Hydra composes: our schemas, our choices, and the values of some overrides."""

import argparse
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.hardware import Hardware
from llmtrain.schema import GROUPS, kinds

CONF = Path(__file__).resolve().parents[2] / "conf"
SEARCHED = "hydra.searchpath="

# Keys whose children are another library's to name: Hydra would ask for a `+` before each.
OPEN_KEYS = re.compile(
    r"(?P<key>(model|teacher)\.config|zero\.extra|launcher\.options|sweep\.\w+_options|data\.weights)"
    r"(\.|(?<=weights)=)"
)


def as_hydra_wants(words: list[str]) -> list[str]:
    return [f"++{word}" if OPEN_KEYS.match(word) else word for word in words]


@cache
def register() -> None:
    """Put the dataclass of every kind of every group into Hydra's store, below ``schema/``."""
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig)
    store.store(group="schema/hardware", name="hardware", node=Hardware)
    for group in GROUPS:
        for kind, part in kinds(group).items():
            store.store(group=f"schema/{group}", name=kind, node=part)


def choices(group: str) -> list[str]:
    """The choices of a group: the YAML files of its folder."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    """Every group that the command line can choose from."""
    return sorted(path.name for path in CONF.iterdir() if choices(path.name))


def command_line() -> list[str]:
    """The words of this process's command line, --config-dir as the word that it stands for.

    Raises ConfigError for a folder that does not exist.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config-dir", "-cd")
    given, words = options.parse_known_args(sys.argv[1:])
    if given.config_dir is None:
        return words
    folder = Path(given.config_dir).expanduser().absolute()
    if not folder.is_dir():
        remedy = "give one that has experiment/<name>.yaml in it"
        raise ConfigError("--config-dir", given.config_dir, "is no folder", remedy)
    is_override = ["=" in word and not word.startswith("-") for word in words]
    first = is_override.index(True) if True in is_override else len(words)
    return [*words[:first], f"{SEARCHED}[file://{folder}]", *words[first:]]  # beside the others


def searched() -> list[str]:
    """The word of the command line that says where else than in conf/ choices lie."""
    return [word for word in command_line() if word.startswith(SEARCHED)]


def composed_values(words: list[str]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        known = any(word.startswith(SEARCHED) for word in words)
        return compose(
            "config", overrides=as_hydra_wants(words if known else [*searched(), *words])
        )


def known_keys() -> list[str]:
    """Every group and every dotted key of the default experiment, for the nearest valid name."""
    return groups() + dotted(composed_values([]))


def dotted(values: Any, prefix: str = "") -> list[str]:
    """The dotted keys of nested values, parents included."""
    keys = []
    for name in values:
        keys.append(f"{prefix}{name}")
        node = values._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            keys += dotted(node, f"{prefix}{name}.")
    return keys
