"""A file's values through its format's table: what is taken over, and what is left."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.migrate.combine import COMBINE
from llmtrain.migrate.correspondence import (
    Ask,
    Case,
    Entry,
    Format,
    Given,
    Left,
    Lost,
    Needless,
    Setting,
    Term,
    Terms,
    To,
    Within,
    is_off,
)
from llmtrain.schema import kinds

PARTS = ("optimizer", "schedule", "adapter", "data")  # whose keys depend on the choice


@dataclass
class Translation:
    """Settings of ours by key, a group's choice by its name; what was left; words to add."""

    settings: dict[str, Setting] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    asks: list[str] = field(default_factory=list)


def translate(values: dict[str, Any], form: Format, case: Case) -> Translation:
    """What a file's values become. Raises ConfigError for one that has no place here at all."""
    made = Translation(asks=list(form.asks))
    terms: Terms = {}
    absent = {key: value for key, value in form.defaults.items() if key not in values}
    take(absent, form, case, made, terms)
    take(values, form, case, made, terms)
    for combine in COMBINE:
        for result in combine(terms, case):
            put(result, made)
    leave_what_parts_lack(made)
    return made


def put(result: "tuple[str, Setting] | Left | Ask", made: Translation) -> None:
    """One result of combining; what a key of its own has said stays."""
    if isinstance(result, Left):
        made.left.append(result)
    elif isinstance(result, Ask):
        made.asks.append(result.word)
    else:
        made.settings.setdefault(*result)


def take(
    values: dict[str, Any],
    form: Format,
    case: Case,
    made: Translation,
    terms: Terms,
    label: str = "",
) -> None:
    """Sort values by the table into settings, terms, and what is left; files within go first."""
    pairs = [pair for pair in entries(values, form) if pair[1].value is not None]
    for entry, given in sorted(pairs, key=lambda pair: not isinstance(pair[0], Within)):
        if given.key in form.unsaid and given.value == form.unsaid[given.key]:
            continue
        is_default = given.key in form.defaults and given.value == form.defaults[given.key]
        named = Given(label + given.key, given.value, is_default)
        if isinstance(entry, Within):
            take_within(entry, named, case, made, terms)
        elif isinstance(entry, Lost | Needless):
            if not (is_off(given.value) or is_default):
                why = entry.instead if isinstance(entry, Lost) else entry.because
                made.left.append(Left(named.key, given.value, why, isinstance(entry, Lost)))
        elif given.value != "auto":
            take_wanted(entry, named, made, terms)


def take_wanted(entry: To | Term, given: Given, made: Translation, terms: Terms) -> None:
    """A value that has a counterpart, by itself or together with others."""
    try:
        value = entry.read(given.value)
    except (TypeError, ValueError):
        raise ConfigError(given.key, given.value, "cannot be read", "correct it") from None
    if isinstance(entry, Term):
        terms[entry.name] = given._replace(value=value, raw=given.value)
    elif value is not None:
        made.settings[entry.key] = Setting(value, given.words, entry.but, given.is_default)
    elif not is_off(given.value):
        made.left.append(Left(given.key, given.value, f"{entry.key} takes no such value", True))


def entries(
    values: dict[str, Any], form: Format, prefix: str = ""
) -> Iterator[tuple[Entry, Given]]:
    """Each value with its entry of the table; mappings that the table does not name are entered."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        entry = form.table.get(key)
        if entry is None and isinstance(value, dict):
            yield from entries(value, form, f"{key}.")
            continue
        entry = entry or nearest_star(key, form) or Lost("this key is not known here")
        yield entry, Given(key, value, False)


def nearest_star(key: str, form: Format) -> Entry | None:
    """The entry for whatever is not named within a mapping, or within one around it."""
    while "." in key:
        key = key.rpartition(".")[0]
        if found := form.table.get(f"{key}.*"):
            return found
    return None


def take_within(entry: Within, given: Given, case: Case, made: Translation, terms: Terms) -> None:
    """Another format's values: here, or in a file beside."""
    values = given.value
    if isinstance(values, str) and values:
        values = read_json(values, case)
        if values is None:
            why = f"is not found; migrate it by itself: it is {entry.format.name}'s"
            made.left.append(Left(given.key, given.value, why, True))
    if isinstance(values, dict):
        take(values, entry.format, case, made, terms, f"{given.key}: ")


def read_json(path: str, case: Case) -> dict[str, Any] | None:
    """A file's mapping, looked for from here and from the folders above the file that names it."""
    for place in (Path.cwd(), case.folder, *case.folder.parents):
        file = place / Path(path).expanduser()
        if file.is_file():
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return None
            return values if isinstance(values, dict) else None
    return None


def leave_what_parts_lack(made: Translation) -> None:
    """Move settings out that the chosen part does not have, such as a rank without an adapter."""
    for group in PARTS:
        if group not in made.settings:
            continue
        choice = made.settings[group].value
        known = {item.name for item in fields(kinds(group)[choice])}
        for key in [key for key in made.settings if key.startswith(f"{group}.")]:
            if key.partition(".")[2] not in known:
                setting = made.settings.pop(key)
                if not (setting.is_default or setting.value in (None, 0.0)):
                    why = f"{group}={choice} has no {key}"
                    name = setting.source.partition("=")[0]
                    made.left.append(Left(name, setting.value, why, True))
