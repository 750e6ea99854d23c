"""`python -m llmtrain.data list`: the catalogue as a table, or for a program."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from llmtrain.data.catalogue import (
    MOST_EPOCHS,
    OPTIMAL_TOKENS,
    Entry,
    Published,
    RowFormat,
    default_folder,
    entries,
    parse_size,
    show_count,
)
from llmtrain.data.published import lack_of
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 240  # columns, where no terminal says how many there are
LEGEND = "~ estimated; tokens are those of the tokenizer that `--format json` names"


def list_entries(arguments: argparse.Namespace) -> None:
    """Print the data sets that the command line asks for."""
    found = chosen(arguments.language, arguments.size)
    if arguments.format == "json":
        print(json.dumps([to_json(entry) for entry in found], indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else WIDE, soft_wrap=not is_terminal)
    console.print(table_of(found))
    console.print(LEGEND, style="dim")
    console.print("get one: python -m llmtrain.data download <name>, use it: data=<name>")


def chosen(language: str | None, size: str | None) -> list[Entry]:
    """The data sets of a language, and those that are enough for a model's size.

    ConfigError for what is neither.
    """
    known = {entry.published.language for entry in entries()}
    if language is not None and language not in known:
        remedy = f"choose one of {', '.join(sorted(known))}"
        raise ConfigError("--language", language, "is in no data set", remedy)
    found = [entry for entry in entries() if language in (None, entry.published.language)]
    return found if size is None else [entry for entry in found if is_enough(entry, asked(size))]


def asked(size: str) -> float:
    """The number of parameters that a word such as 1b names."""
    if (number := parse_size(size)) is None:
        raise ConfigError("--for", size, "is no size of a model", "give one such as 350m, 1b or 7b")
    return number


def is_enough(entry: Entry, num_parameters: float) -> bool:
    """Whether text gives each parameter its 20 tokens in at most four passes; rows always do."""
    published = entry.published
    needed = OPTIMAL_TOKENS * num_parameters
    return published.format is not RowFormat.text or published.num_tokens * MOST_EPOCHS >= needed


def is_here(entry: Entry) -> bool:
    """Whether a data set lies where its download puts it."""
    return lack_of(entry.name, str(default_folder(entry.name)), entry.published) is None


def table_of(found: Sequence[Entry]) -> "Table":
    """One row a data set."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("data=", style="bold", no_wrap=True)
    for name in ("tokens", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("lang", "format", "here"):
        table.add_column(name, no_wrap=True)
    for name in ("what it is", "licence", "suits"):
        table.add_column(name, overflow="fold")
    for entry in found:
        table.add_row(*row_of(entry))
    return table


def row_of(entry: Entry) -> list[str]:
    """A data set's cells; what is estimated begins with ~."""
    published = entry.published
    tokens = show_count(published.num_tokens)
    gib = published.download_gib
    size = f"{gib:,.0f}" if gib >= 1000 else f"{gib:.3g}"
    return [
        entry.name,
        f"~{tokens}" if published.tokens_are_estimate else tokens,
        f"~{size}" if published.size_is_estimate else size,
        published.language,
        published.format.value,
        "[green]yes[/]" if is_here(entry) else "",
        published.title,
        published.licence + (" (gated)" if published.gated else ""),
        published.suits,
    ]


def to_json(entry: Entry) -> dict[str, Any]:
    """All that the catalogue knows of a data set, and whether it is here."""
    values = {item.name: getattr(entry.published, item.name) for item in fields(Published)}
    values["format"] = entry.published.format.value
    return {"name": entry.name, **values, "page": entry.published.page, "is_here": is_here(entry)}
