"""What tells runs apart: the parameters of a sweep, or the keys of the config that differ."""

import json
from typing import Any

from llmtrain.report.record import Run
from llmtrain.schema import GROUPS

# Where a run lies, how it is shown and what is done about its end: never why a loss is lower.
PLACES = {"name", "output_root", "cache_root", "resume", "format", "debug"}
PLACES |= {"train.log_every", "train.eval_every", "train.eval_batches"}
PLACE_GROUPS = {"checkpoint", "on_finish", "on_divergence", "launcher", "tracker"}
CHOICES = [
    f"{group}.{name}" for group in [*GROUPS, "teacher", "hardware"] for name in ("name", "kind")
]


def varied_keys(runs: list[Run]) -> list[str]:
    """The keys in which runs differ, those that only follow from a choice left out.

    In a sweep these are the parameters of its trials.
    """
    if any(run.params for run in runs):
        return swept_keys([run.params or {} for run in runs])
    differing = different_keys([run.config for run in runs if run.config])
    choices = chosen(differing)
    named = frozenset().union(*(run.named for run in runs))
    return [key for key in differing if is_told(key, choices, named, runs)]


def swept_keys(params: list[dict[str, Any]]) -> list[str]:
    """The parameters that take more than one value, or all where there is one trial."""
    keys = list(dict.fromkeys(key for values in params for key in values))
    several = [key for key in keys if len({shown(values.get(key)) for values in params}) > 1]
    return several if len(params) > 1 else keys


def different_keys(configs: list[dict[str, Any]]) -> list[str]:
    """In the order of the files, without those of places."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if key not in PLACES
        and key.split(".")[0] not in PLACE_GROUPS
        and len({shown(config.get(key)) for config in configs}) > 1
    ]


def chosen(differing: list[str]) -> list[str]:
    """Of the keys that differ those that name what was chosen, one a group."""
    found: dict[str, str] = {}
    for key in CHOICES:
        if key in differing:
            found.setdefault(key.split(".")[0], key)
    return list(found.values())


def is_told(key: str, choices: list[str], named: frozenset[str], runs: list[Run]) -> bool:
    """Whether a key says more than the choices do: it was asked for, or follows from none."""
    if key in choices or key in named:
        return True
    return ".recipe." not in key and not any(follows(key, choice, runs) for choice in choices)


def follows(key: str, choice: str, runs: list[Run]) -> bool:
    """Whether runs of one choice have one value of a key."""
    values: dict[str, str] = {}
    return all(
        values.setdefault(shown(run.config.get(choice)), value) == value
        for run in runs
        if run.config
        for value in [shown(run.config.get(key))]
    )


def setting(run: Run, key: str) -> Any:
    """The value of a varied key in one run; None where it has none."""
    return run.params.get(key) if run.params is not None else run.config.get(key)


def shown(value: Any) -> str:
    """A value as one writes it on a command line, numbers without needless digits."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def short_names(keys: list[str]) -> dict[str, str]:
    """Each key as the fewest of its last words that no other ends in; a choice as its group."""
    plain = {key: key.removesuffix(".name").removesuffix(".kind") for key in keys}
    return {key: shortest(plain[key], list(plain.values())) for key in keys}


def shortest(key: str, keys: list[str]) -> str:
    """The fewest last words of a key that tell it from the other keys."""
    words = key.split(".")
    ends = [".".join(words[place:]) for place in reversed(range(len(words)))]
    return next(
        (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key
    )
