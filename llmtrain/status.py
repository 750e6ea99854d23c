"""All runs below a folder in one table: which train, which ended and how, which need a look."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import ConfigError
from llmtrain.finished import command
from llmtrain.folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXAMPLES = """examples:
  python -m llmtrain.status
  python -m llmtrain.status outputs --watch
  python -m llmtrain.status /data/outputs --json
"""
QUIET_SECONDS = 1800.0  # without a sign of life, beside the time of some steps
QUIET_STEPS = 10
WATCH_SECONDS = 2.0
TAIL_BYTES = 2**16  # of the metrics: many records
STYLES = {
    "running": "green",
    "stale": "yellow",
    "failed": "red",
    "pruned": "dim",
    "unreadable": "red",
}


@dataclass(frozen=True)
class Row:
    """One run as its folder shows it now; None for what it does not say.

    ``state`` is what the run says of itself (planned, running, done, failed, stopped), or stale: it
    says running, and no process holds its folder or it has been quiet for long. ``last_checkpoint``
    is a step; ``age_seconds`` counts from when the run last said how it is.
    """

    name: str
    path: str
    state: str
    step: int | None
    num_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    last_checkpoint: int | None
    restarts: int
    skipped_steps: int
    age_seconds: float
    error: str | None


def main(words: list[str] | None = None) -> int:
    """List the runs as the command line says, and return the exit code."""
    return command(list_runs, parser().parse_args(words))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(
        prog="python -m llmtrain.status",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("folder", nargs="?", default="outputs", help="runs lie in or below it")
    options.add_argument(
        "--watch", action="store_true", help="stay, and show every 2 s how they are"
    )
    options.add_argument("--json", action="store_true", help="the same for programs")
    return options


def list_runs(arguments: argparse.Namespace) -> None:
    """Print the runs below a folder, newest first. Raises ConfigError where there is no folder."""
    root = Path(arguments.folder).expanduser()
    if not root.is_dir():
        raise ConfigError("folder", root, "does not exist", "give the output_root of your runs")
    if arguments.watch:
        watch(root)
        return
    rows = rows_below(root)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
    elif rows:
        console().print(table_of(rows))
    else:
        print(f"No runs below {root}.")


def watch(root: Path) -> None:
    """Show the runs until Ctrl+C; whatever is on the screen then stays there."""
    from rich.live import Live

    with suppress(KeyboardInterrupt), Live(console=console(), auto_refresh=False) as live:
        while True:
            rows = rows_below(root)
            live.update(table_of(rows) if rows else f"No runs below {root}.", refresh=True)
            time.sleep(WATCH_SECONDS)


def rows_below(root: Path) -> list[Row]:
    """All runs below a folder, those first that last said something."""
    now = time.time()
    return sorted((row_of(run, now) for run in runs_below(root)), key=lambda row: row.age_seconds)


def runs_below(root: Path) -> Iterator[RunFolder]:
    """The run folders at or below a folder, found by their status."""
    for path, folders, _ in os.walk(root):
        run = RunFolder(path)
        if run.status.exists():
            folders.clear()  # no run lies within another
            yield run
        folders[:] = [name for name in folders if not name.startswith(".")]


def row_of(run: RunFolder, now: float) -> Row:
    """A run at a time in seconds since 1970; older versions said less of themselves."""
    status, record = status_of(run), latest_record(run.metrics)
    state = state_of(run, status, record, now)
    return Row(
        name=run.path.resolve().name,
        path=str(run.path),
        state=state,
        step=status.get("step"),
        num_steps=status.get("num_steps") or planned_steps(run),
        loss=record.get("loss"),
        tokens_per_second=record.get("tokens_per_second"),
        eta_seconds=status.get("eta_seconds") if state == "running" else None,
        last_checkpoint=max(run.checkpoint_steps(), default=None),
        restarts=status.get("restarts", 0),
        skipped_steps=status.get("skipped_steps", 0),
        age_seconds=max(0.0, now - status.get("time", run.status.stat().st_mtime)),
        error=status.get("error"),
    )


def status_of(run: RunFolder) -> dict[str, Any]:
    """What a run says of itself; one broken file does not hide the other runs."""
    try:
        return {"state": "unreadable"} | run.read_status()
    except (OSError, ValueError, TypeError):
        return {"state": "unreadable"}


def latest_record(path: Path) -> dict[str, Any]:
    """The last whole record of a step; empty where there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # cut short by a kill, or by the beginning of the tail
            continue
        if "loss" in record:
            return dict(record)
    return {}


def planned_steps(run: RunFolder) -> int | None:
    """The steps of the plan, for a status that an older version wrote."""
    try:
        return json.loads(run.plan.read_text(encoding="utf-8")).get("num_steps")
    except (OSError, ValueError):
        return None


def state_of(run: RunFolder, status: dict[str, Any], record: dict[str, Any], now: float) -> str:
    """What a run says of its state, unless it says running and is not."""
    patience = QUIET_SECONDS + QUIET_STEPS * (record.get("step_seconds") or 0.0)
    is_running = status["state"] == "running"
    if is_running and (not run.is_locked() or now - last_sign(run) > patience):
        return "stale"
    return str(status["state"])


def last_sign(run: RunFolder) -> float:
    """When the run last wrote of itself: status, records or logs; seconds since 1970."""
    files = [run.status, run.metrics, *run.logs.glob("*")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def console() -> "Console":
    """The terminal; wide enough for every column where it is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def table_of(rows: list[Row]) -> "Table":
    """A line for each run."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "tok/s", "left", "saved", "restarts", "skipped", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        state = Text(row.state, style=STYLES.get(row.state, ""))
        table.add_row(Text(row.name), state, *cells(row))
    return table


def cells(row: Row) -> list[str]:
    """The figures of a row as text; nothing for what is not known."""
    of = f"/{row.num_steps:,}" if row.num_steps is not None else ""
    return [
        f"{row.step:,}{of}" if row.step is not None else "",
        f"{row.loss:.4f}" if row.loss is not None else "",
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else "",
        span(row.eta_seconds) if row.eta_seconds is not None else "",
        f"{row.last_checkpoint:,}" if row.last_checkpoint is not None else "",
        f"{row.restarts:,}",
        f"{row.skipped_steps:,}",
        span(row.age_seconds),
    ]


def span(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            count = seconds / size
            return f"{count:.1f} {unit}" if unit != "min" else f"{count:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
