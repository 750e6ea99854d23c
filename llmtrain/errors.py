"""What a user can do wrong, said in one line; and the exit codes of every command."""

import difflib
from collections.abc import Iterable

DONE = 0
FAILED = 1
REFUSED = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped, and the same command continues


class ConfigError(Exception):
    """A user's mistake, found before anything started.

    It reads ``key=value reason; remedy.`` and ends the command with exit code 2.
    """

    def __init__(self, key: str, value: object, reason: str, remedy: str) -> None:
        super().__init__(f"{key}={show(value)} {reason}; {remedy}.")
        self.key = key


class TrainingError(Exception):
    """A run that started and could not end: one line, exit code 1."""


def show(value: object) -> str:
    """A config value as one writes it on the command line."""
    return "null" if value is None else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for a name that does not exist: the nearest that does, or all if they are few."""
    choices = sorted(set(known))
    found = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if found:
        return f"the nearest is {found[0]}"
    return f"choose one of {', '.join(choices)}" if len(choices) < 40 else "see --cfg job for all"
