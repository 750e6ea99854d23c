"""The Hydra door: registers the schemas, composes, and says Hydra's errors in our one line."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from llmtrain.config import RunConfig
from llmtrain.errors import (
    DONE,
    FAILED,
    REFUSED,
    STOPPED,
    ConfigError,
    TrainingError,
    is_disk_full,
    nearest,
)
from llmtrain.hardware import Hardware
from llmtrain.schema import GROUPS, kinds

CONF = Path(__file__).resolve().parent.parent / "conf"

# Keys whose children are another library's to name: Hydra would ask for a `+` before each.
OPEN_KEYS = re.compile(r"(?P<key>(model|teacher)\.config|zero\.extra|launcher\.options)\.")

Task = Callable[[RunConfig], float | None]


class Point(NamedTuple):
    """One point of a multirun: its overrides, and its config or why it has none."""

    words: list[str]
    config: RunConfig | ConfigError


Grid = Callable[[Iterable[Point]], int]


def main(task: Task, command: str, summary: str, grid: Grid | None = None) -> int:
    """Compose the command line into a config, hand it to ``task``, and return the exit code.

    A whole number that ``task`` returns is the exit code. A multirun hands its points to ``grid``
    all at once, where that is given, and to ``task`` one by one where it is not.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(command, summary))
        return DONE
    points = Points(task)
    try:
        if grid is not None and {"-m", "--multirun"} & set(sys.argv[1:]):
            return grid(grid_points(sys.argv[1:]))
        compose_points(points)
        if points.single is not None:
            code = task(to_config(points.single))
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
    return FAILED if points.num_failed else DONE


class Points:
    """What Hydra calls with each composed point.

    A single point is kept and run after Hydra has returned, so that its errors are ours alone. In
    a multirun a point that fails is reported and the others go on.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.single: DictConfig | None = None
        self.num_failed = 0
        self.seen: set[str] = set()

    def __call__(self, values: DictConfig) -> float | None:
        job = HydraConfig.get()
        if job.mode != RunMode.MULTIRUN:
            self.single = values
            return None
        print(f"\n[{job.job.num}] {' '.join(job.overrides.task)}", flush=True)
        try:
            config = to_config(values)
            self.refuse_twin(config)
            return self.task(config)
        except (ConfigError, TrainingError) as error:
            self.num_failed += 1
            print(f"[{job.job.num}] {error}", file=sys.stderr)
            return float("nan")

    def refuse_twin(self, config: RunConfig) -> None:
        """Raise ConfigError for a point that would land in another point's folder."""
        folder = f"{config.name}-{config.identity}"
        if folder in self.seen:
            reason = "is the name of two points that learn the same"
            raise ConfigError("name", config.name, reason, "vary name too, or what is learned")
        self.seen.add(folder)


def report(error: ConfigError | TrainingError) -> int:
    """Print one line and give the exit code that belongs to it."""
    print(error, file=sys.stderr)
    return REFUSED if isinstance(error, ConfigError) else FAILED


def compose_points(points: Points) -> None:
    """Run Hydra; whatever it raises over a command line is a mistake in it."""
    words = sys.argv[1:]
    try:
        run_hydra(points)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise explain(error, words) from None


def run_hydra(task: Callable[[DictConfig], float | None]) -> None:
    """Let Hydra compose the command line, sweep it if asked, and call ``task`` for each point."""
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors to us instead of printing them
    words = as_hydra_wants(sys.argv[1:])
    sys.argv[1:] = sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # goes first
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()


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


def to_config(values: DictConfig) -> RunConfig:
    """The typed tree of what Hydra composed. Raises ConfigError for a value that is missing."""
    refuse_strangers(values)
    try:
        config = OmegaConf.to_object(values)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        remedy = f"give it on the command line: {key}=..."
        raise ConfigError(key, "???", "is needed", remedy) from None
    except OmegaConfBaseException as error:  # a value that only shows when pointers are followed
        raise explain(error, sys.argv[1:]) from None
    assert isinstance(config, RunConfig)
    for group in GROUPS:
        part = getattr(config, group)
        if part is None:
            raise ConfigError(group, None, "is no choice", nearest("", choices(group)))
        if part.kind != type(part).kind:
            remedy = f"write {group}={part.kind}"
            raise ConfigError(f"{group}.kind", part.kind, "is chosen with its group", remedy)
    return config


def overrides() -> list[str]:
    """The overrides of the point that is being run; of a multirun, its own values only."""
    if HydraConfig.initialized():
        return list(HydraConfig.get().overrides.task)
    return sys.argv[1:]


def refuse_strangers(values: DictConfig, prefix: str = "") -> None:
    """Raise ConfigError for a key that `+` or `++` put beside those of a schema."""
    known = getattr(OmegaConf.get_type(values), "__dataclass_fields__", None)
    for name in values:
        key = prefix + str(name)
        if known is not None and name not in known:
            remedy = nearest(key, known_keys())
            raise ConfigError(key, values[name], "is no key of the config", remedy)
        node = values._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            refuse_strangers(node, f"{key}.")


def choices(group: str) -> list[str]:
    """The choices of a group: the YAML files of its folder."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    """Every group that the command line can choose from."""
    return sorted(path.name for path in CONF.iterdir() if choices(path.name))


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
            "-m            multirun: KEY=A,B runs a point for each value, each in its own folder",
        ]
    )


def explain(error: Exception, words: list[str]) -> ConfigError:
    """Hydra's or OmegaConf's error as one line: key, value, reason, remedy."""
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        remedy = "write KEY=VALUE, quoted where it has spaces, commas or brackets"
        return ConfigError(key, value, "cannot be read", remedy)
    text = " ".join(str(error).split())
    for pattern, explanation in EXPLANATIONS:
        if match := re.search(pattern, text):
            return explanation(match, asked(words))
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(cause) not in str(error):
        return explain(cause, words)
    return ConfigError("command line", " ".join(words), f"is refused: {text}", "see --help")


def asked(words: list[str]) -> dict[str, str]:
    """``{key: value}`` of the overrides on a command line."""
    pairs = (word.lstrip("+~").partition("=") for word in words if "=" in word)
    return {key: value for key, _, value in pairs}


def unknown_choice(match: re.Match[str], values: dict[str, str]) -> ConfigError:
    group, choice = match["group"], match["choice"]
    key = next((key for key in values if key.split("@")[0] == group), group)
    return ConfigError(key, choice, f"is no choice of {group}", nearest(choice, choices(group)))


def unknown_key(match: re.Match[str], values: dict[str, str]) -> ConfigError:
    key = match["key"]
    value = next((value for name, value in values.items() if name.startswith(key)), "")
    return ConfigError(key, value, "is no key of the config", nearest(key, known_keys()))


def wrong_type(match: re.Match[str], values: dict[str, str]) -> ConfigError:
    key, value = match["key"], match["value"]
    return ConfigError(
        key, value, f"is not {wanted_type(match['type'])}", "see --cfg job for its form"
    )


def wrong_member(match: re.Match[str], values: dict[str, str]) -> ConfigError:
    known = match["known"].replace("'", "").split(", ")
    return ConfigError(
        match["key"], match["value"], "is not a choice", f"choose one of {', '.join(known)}"
    )


def sweep_without_multirun(match: re.Match[str], values: dict[str, str]) -> ConfigError:
    key, _, value = match["word"].partition("=")
    return ConfigError(key, value, "is several values", "add -m to run one point for each")


def null_for_a_choice(match: re.Match[str], values: dict[str, str]) -> ConfigError:
    group = next((key for key, value in values.items() if value == "null" and key in groups()), "")
    return ConfigError(group, "null", f"is no choice of {group}", nearest("", choices(group)))


def value_for_a_group(match: re.Match[str], values: dict[str, str]) -> ConfigError:
    return ConfigError(
        match["key"], match["value"], "is given for several keys", "give one of its keys"
    )


def bad_interpolation(match: re.Match[str], values: dict[str, str]) -> ConfigError:
    return ConfigError(
        match["key"], "${" + match["to"] + "}", "points at nothing", "give a value instead"
    )


def wanted_type(name: str) -> str:
    """A type's name in words."""
    words = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    return words.get(name, f"of type {name}")


def grid_points(words: list[str]) -> Iterator[Point]:
    """Every point of a multirun, in Hydra's own order.

    Composing takes a tenth of a second, and a grid is often large. A hardware preset fills
    ``hardware`` alone, so each is composed once and put into the points that ask for it.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    register()
    words = [word for word in as_hydra_wants(words) if word not in ("-m", "--multirun")]
    try:
        parsed = OverridesParser.create().parse_overrides(words)
        (batch,) = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise explain(error, words) from None
    known: dict[tuple[str, ...], RunConfig | ConfigError] = {}
    for point in batch:
        yield Point(
            [word for word in point if is_varied(word, batch)], config_of_point(point, known)
        )


def is_varied(word: str, batch: Any) -> bool:
    """Whether a point's override is another one in other points."""
    return any(word not in point for point in batch)


def config_of_point(
    words: list[str], known: dict[tuple[str, ...], RunConfig | ConfigError]
) -> RunConfig | ConfigError:
    """A point's config, put together from those of its parts that are known."""
    on_hardware = tuple(word for word in words if word.startswith("hardware"))
    rest = tuple(word for word in words if not word.startswith("hardware"))
    has_preset = any(word.startswith("hardware=") for word in on_hardware)
    if not has_preset or any(word.startswith("experiment=") for word in rest):
        return config_or_refusal(words)
    for part in (rest, on_hardware):
        if part not in known:
            known[part] = config_or_refusal(list(part))
    config, machine = known[rest], known[on_hardware]
    if isinstance(config, ConfigError) or isinstance(machine, ConfigError):
        return config if isinstance(config, ConfigError) else machine
    return replace(config, hardware=machine.hardware)


def config_or_refusal(words: list[str]) -> RunConfig | ConfigError:
    try:
        return to_config(composed_values(words))
    except ConfigError as error:
        return error
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        return explain(error, words)


def composed(words: list[str]) -> RunConfig:
    """The config of some overrides, for whoever has no command line of them."""
    register()
    return to_config(composed_values(words))


def composed_values(words: list[str]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=words)


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


EXPLANATIONS: list[tuple[str, Callable[[re.Match[str], dict[str, str]], ConfigError]]] = [
    (r"Could not find '(?P<group>[\w/]+)/(?P<choice>[^/']+)'", unknown_choice),
    (r"Could not override '(?P<key>[^']+)'\. No match", unknown_key),
    (r"Could not override '(?P<key>[^']+)'\. ?To append", unknown_key),
    (r"Key '[^']+' not in '\w+' full_key: (?P<key>\S+)", unknown_key),
    (r"Key '[^']+' is not in struct full_key: (?P<key>\S+)", unknown_key),
    (
        r"Value '(?P<value>.*?)' of type '\w+' could not be converted to (?P<type>\w+) "
        r"full_key: (?P<key>\S+)",
        wrong_type,
    ),
    (r"Value '(?P<value>.*?)' is not a valid (?P<type>\w+).* full_key: (?P<key>\S+)", wrong_type),
    (
        r"Invalid value '(?P<value>.*?)', expected one of \[(?P<known>.*?)\] "
        r"full_key: (?P<key>\S+)",
        wrong_member,
    ),
    (r"Config group override must be a string", null_for_a_choice),
    (r"Ambiguous value for argument '(?P<word>.*?)' 1\. ", sweep_without_multirun),
    (r"Invalid type assigned: .* value: (?P<value>.*) full_key: (?P<key>\S+)", value_for_a_group),
    (r"Merge error: .* value: (?P<value>.*) full_key: (?P<key>\S+)", value_for_a_group),
    (r"Interpolation key '(?P<to>[^']+)' not found full_key: (?P<key>\S+)", bad_interpolation),
]
