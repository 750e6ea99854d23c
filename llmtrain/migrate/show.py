"""What a migration says: what has another meaning, what was left, and the lines that run it."""

import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmtrain.migrate.correspondence import Left, shown
from llmtrain.migrate.experiment import command_of
from llmtrain.migrate.translate import Translation

WIDTH = 100


def told(made: Translation, place: Path, name: str) -> Iterator[str]:
    """Lines for the terminal."""
    yield f"{place}: {len(made.settings)} settings, from a file of {name}"
    changed = [
        (f"{key}={shown(each.value)}", f"{each.source}: {each.but}")
        for key, each in made.settings.items()
        if each.but
    ]
    yield from titled("Taken over with another meaning", changed)
    lost = [each for each in made.left if each.is_lost]
    yield from titled("Without a counterpart", by_reason(lost))
    yield from titled(
        "Not taken over, and not needed", by_reason(each for each in made.left if not each.is_lost)
    )
    yield "\nWhat it would be, and the run:"
    yield f"  {command_of(place, made.asks, 'plan')}"
    yield f"  {command_of(place, made.asks)}"


def by_reason(left: Iterable[Left]) -> list[tuple[str, str]]:
    """Values that were left, those of one reason together."""
    found: dict[str, list[str]] = {}
    for each in left:
        found.setdefault(each.why, []).append(f"{each.key}={shown(each.value)}")
    return [(", ".join(words), why) for why, words in found.items()]


def titled(title: str, pairs: list[tuple[str, str]]) -> Iterator[str]:
    """A list of what and why below a title; nothing where the list is empty."""
    if pairs:
        yield f"\n{title}"
    for what, why in pairs:
        yield from wrapped(what, "  ")
        yield from wrapped(why, "      ")


def wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
