"""Every command of the README and the guides is one that works: it composes, or its words parse."""

import importlib
import re
from pathlib import Path

import pytest

from benchmarks.documents import PAGES, commands, smaller, words_of
from llmtrain.compose import composed
from llmtrain.compose.points import grid_points, space_of
from llmtrain.errors import ConfigError

COMPOSED = ("run", "plan")


ALL = [
    pytest.param(page, name, words, id=f"{page.name}: {name} {words[:60]}")
    for page in PAGES
    for name, words in commands(page)
]


@pytest.mark.parametrize(("page", "name", "text"), ALL)
def test_a_command_of_the_documentation_can_be_typed(page: Path, name: str, text: str) -> None:
    words = words_of(text)
    if name == "data" and words[0] == "prepare":
        parse(name, words)
        composed([word for word in words[1:] if "=" in word])
    elif name not in COMPOSED:
        parse(name, words)
    elif "-m" not in words:
        composed([word for word in words if not word.startswith("--")])
    else:
        words.remove("-m")
        space_of(words)
        first = next(iter(grid_points(first_of_each(words))))
        assert not isinstance(first.config, ConfigError), first.config


def first_of_each(words: list[str]) -> list[str]:
    """A grid without the words whose values are intervals, which are no points."""
    return [word for word in words if "interval(" not in word and "range(" not in word]


def parse(name: str, words: list[str]) -> None:
    """Let a command's own parser read the words, and do nothing."""
    module = f"llmtrain.{name}"
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no {module}"
    if spec.submodule_search_locations is not None:
        module = {"report": "llmtrain.report.command"}.get(name, f"{module}.__main__")
    parser = getattr(importlib.import_module(module), "parser", None)
    if parser is not None:
        parser().parse_args(words)


def test_the_documentation_has_commands() -> None:
    assert len(ALL) > 60


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_no_command_that_would_shut_a_machine_down_is_more_than_rehearsed() -> None:
    risky = [words_of(text) for page in PAGES for _, text in commands(page) if "on_finish." in text]
    assert len(risky) > 3
    for words in risky:
        assert smaller(words) == ["launcher=dry"]
