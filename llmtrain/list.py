"""What a command line can choose: the groups of conf/, and a line about each of their choices."""

import argparse
import json
import sys
from collections.abc import Iterator

from llmtrain.compose.composing import CONF, choices, groups
from llmtrain.errors import ConfigError, nearest
from llmtrain.finished import command

EXAMPLES = """examples:
  python -m llmtrain.list
  python -m llmtrain.list models
  python -m llmtrain.list hardware --format json
"""


def main(words: list[str] | None = None) -> int:
    """List what the command line asks for, and return the exit code."""
    return command(list_choices, parser().parse_args(words))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(
        prog="python -m llmtrain.list",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("group", nargs="?", help=f"{', '.join(groups())}, also in the plural")
    options.add_argument("--format", default="table", choices=["table", "json"])
    return options


def list_choices(arguments: argparse.Namespace) -> None:
    """Print one group, or all. Raises ConfigError for a group that does not exist."""
    known = groups()
    wanted = known if arguments.group is None else [group_of(arguments.group, known)]
    found = {group: dict(described(group)) for group in wanted}
    if arguments.format == "json":
        print(json.dumps(for_json(found), indent=2, ensure_ascii=False))
        return
    for group, lines in found.items():
        print("\n".join(table(group, lines)))


def group_of(word: str, known: list[str]) -> str:
    """The group that a word means: its name, or the plural of it."""
    for group in known:
        if word in (group, f"{group}s"):
            return group
    raise ConfigError("group", word, "does not exist", nearest(word, known))


def described(group: str) -> Iterator[tuple[str, str]]:
    """Each choice with what its file says of it."""
    for choice in choices(group):
        yield choice, description((CONF / group / f"{choice}.yaml").read_text(encoding="utf-8"))


def description(text: str) -> str:
    """The first comment line of a YAML file that is for people: no directive, no command."""
    for line in text.splitlines():
        said = line.removeprefix("#").strip()
        if line.startswith("#") and not said.startswith(("@", "python ")):
            return said
    return ""


def for_json(found: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """One object a choice; ``word`` is what the command line takes."""
    return [
        {"group": group, "name": name, "word": f"{group}={name}", "description": what}
        for group, lines in found.items()
        for name, what in lines.items()
    ]


def table(group: str, lines: dict[str, str]) -> Iterator[str]:
    """A group's choices below each other."""
    width = max(map(len, lines), default=0)
    yield f"{group}="
    for name, what in lines.items():
        yield f"  {name:<{width}}  {what}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
