"""Every command of the README and the guides is one that works: it composes, or its words parse."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.compose import composed
from llmtrain.compose.points import grid_points, space_of
from llmtrain.errors import ConfigError
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"(?:python -m llmtrain[.]|llmtrain )([a-z]+) ?(.*)", re.DOTALL)
PLACES = {
    "<run>": "some-0123abcd",
    "<sweep>": "some_sweep",
    "<step>": "10",
    "<name>": "none",
    "...": "somewhere",
}
COMPOSED = ("run", "plan")


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """The command and the words of each line of a page's shell blocks that begins with ours."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if found := COMMAND.match(line.strip()):
                yield found[1], found[2]


ALL = [
    pytest.param(page, name, words, id=f"{page.name}: {name} {words[:60]}")
    for page in PAGES
    for name, words in commands(page)
]


def words_of(text: str) -> list[str]:
    """The words of a shell line, without its comment and with something in each place."""
    for place, value in PLACES.items():
        text = text.replace(place, value)
    return shlex.split(re.sub(r"<[^>]*>", "something", text), comments=True)


@pytest.mark.parametrize(("page", "name", "text"), ALL)
def test_a_command_of_the_documentation_can_be_typed(page: Path, name: str, text: str) -> None:
    words = words_of(text)
    if name not in COMPOSED:
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
