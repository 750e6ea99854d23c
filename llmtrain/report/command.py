"""`python -m llmtrain.report`: its options, and a report in each of its formats."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from llmtrain.errors import ConfigError, is_disk_full
from llmtrain.finished import command
from llmtrain.folder import write_text
from llmtrain.report import page, picture, table
from llmtrain.report.comparison import Comparison, compare

EXAMPLES = """examples:
  python -m llmtrain.report outputs/<sweep>
  python -m llmtrain.report outputs --out report.html
  python -m llmtrain.report outputs/<run> outputs/<run> --format md
"""
FORMATS: dict[str, Callable[[Comparison, Path], str | bytes]] = {
    "html": page.render,
    "md": lambda comparison, out: table.to_markdown(comparison),
    "csv": lambda comparison, out: table.to_csv(comparison),
    "png": lambda comparison, out: picture.draw(comparison),
}
PRINTED = ("md", "csv")  # unless they are told where to go


def main(words: list[str] | None = None) -> int:
    """Write the report that the command line asks for, and return the exit code."""
    return command(report, parser().parse_args(words))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(
        prog="python -m llmtrain.report",
        description="Compare runs: a page with their curves, figures and settings, or a table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("paths", nargs="+", help="a sweep's folder, runs, or folders of runs")
    options.add_argument("--format", choices=list(FORMATS), help="html, or what --out ends in")
    options.add_argument("--out", help="a file (default: report.<format> in the first folder)")
    return options


def report(arguments: argparse.Namespace) -> None:
    """Write or print it. Raises ConfigError for a path without runs or a place without room."""
    comparison = compare([Path(path).expanduser() for path in arguments.paths])
    out = Path(arguments.out).expanduser() if arguments.out else None
    form = arguments.format or (form_of(out) if out else "html")
    if out is None and form in PRINTED:
        print(made(comparison, form, comparison.place), end="")
        return
    print(write(comparison, form, out or comparison.place / f"report.{form}"))


def form_of(out: Path) -> str:
    """The format that a file's name says."""
    form = out.suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise ConfigError("--out", out, "ends in no format", f"say --format {'|'.join(FORMATS)}")
    return form


def write_report(paths: list[Path], out: Path) -> Path:
    """Write what ``out`` ends in (.html, .md, .csv or .png) about runs; gives its path.

    Raises ConfigError for a path without runs, a missing package and a place without room.
    """
    return write(compare(paths), form_of(out), out)


def write(comparison: Comparison, form: str, out: Path) -> Path:
    """Write it in one format; its folder is made."""
    if out.is_dir():
        raise ConfigError("--out", out, "is a folder", f"say {out / f'report.{form}'}")
    content = made(comparison, form, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, content) if isinstance(content, str) else write_bytes(out, content)
    except OSError as error:
        reason = "the disk is full" if is_disk_full(error) else str(error.strerror).lower()
        raise ConfigError("--out", out, f"cannot be written ({reason})", "say another") from None
    return out


def made(comparison: Comparison, form: str, out: Path) -> str | bytes:
    """A report in one format; what of a name is no text (half a character) becomes a ?."""
    content = FORMATS[form](comparison, out)
    return content if isinstance(content, bytes) else content.encode(errors="replace").decode()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there wholly or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
