"""Hydra's and OmegaConf's errors in our one line: key, value, reason, remedy."""

import re
from collections.abc import Callable

from hydra.errors import OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from llmtrain.compose.composing import choices, groups, known_keys
from llmtrain.errors import ConfigError, nearest


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


EXPLANATIONS: list[tuple[str, Callable[[re.Match[str], dict[str, str]], ConfigError]]] = [
    (r"Could not (find|load) '(?P<group>[\w/]+)/(?P<choice>[^/']+)'", unknown_choice),
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
