"""What a user sees of a sweep: a line for each trial, those that run, and a table at the end."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmtrain.sweep.grid import Direction, Grid
from llmtrain.trials.record import SweepFolder, Trial

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_ROWS = 20
STYLES = {"failed": "red", "refused": "red", "pruned": "dim", "done": "green"}


class HasTrials(Protocol):
    @property
    def trials(self) -> list[Trial]: ...


class Board:
    """Shows a sweep. A trial that has the terminal for itself shows the rest on its own."""

    def __init__(self, asked: Grid, folder: SweepFolder, all_trials: HasTrials) -> None:
        self.asked, self.folder, self.all = asked, folder, all_trials
        self.console = Console(highlight=False)
        is_live = asked.num_parallel > 1 and self.console.is_terminal
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.is_live = is_live
        self.waits_for: int | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Around a sweep: on a terminal that trials share, those that run now."""
        with self.live if self.is_live else nullcontext():
            yield

    def say(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style), soft_wrap=True)
        sys.stdout.flush()

    def show_start(self, trial: Trial) -> None:
        """Head what a trial says, where it says it here."""
        if self.asked.num_parallel == 1:
            self.say(f"\n[{trial.number}] {words_of(trial)}")

    def show_wait(self, trial: Trial) -> None:
        """Say once that another process trains what a trial would."""
        if self.waits_for != trial.number:
            self.say(f"[{trial.number}] {words_of(trial)}  waits: another process trains it")
        self.waits_for = trial.number

    def show_end(self, trial: Trial) -> None:
        """One line, an error on stderr."""
        if trial.error is not None:
            sys.stdout.flush()
            print(f"[{trial.number}] {trial.error}", file=sys.stderr, flush=True)
        else:
            self.say(f"[{trial.number}] {words_of(trial)}  {self.outcome(trial)}")

    def refresh(self, running: list[Trial]) -> None:
        """Show the trials that run now."""
        if self.is_live:
            self.live.update(self.table_of_running(running), refresh=True)

    def table_of_running(self, running: list[Trial]) -> "RenderableType":
        table = Table(box=None, pad_edge=False)
        num_over = sum(trial.is_over for trial in self.all.trials)
        table.add_column(f"{num_over} over")
        table.add_column("")
        for trial in running:
            status = trial.folder.read_status() if trial.folder is not None else {}
            step = f"step {status.get('step', 0)}/{status.get('num_steps') or '?'}"
            table.add_row(step, f"[{trial.number}] {words_of(trial)}")
        return table

    def outcome(self, trial: Trial) -> str:
        """How a trial ended, in a few words."""
        if trial.values is None:
            return trial.state
        pairs = zip(self.asked.goals, trial.values, strict=True)
        return "  ".join(f"{name} {value:.4g}" for name, value in pairs)

    def show_all(self) -> None:
        """The best trials of all, and where the rest is."""
        trials = self.ranked()
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
        for name in ("trial", "state", *self.asked.goals, *keys):
            is_figure = name in self.asked.goals
            table.add_column(name, justify="right" if is_figure else "left", overflow="fold")
        for trial in trials[:MOST_ROWS]:
            table.add_row(*self.cells(trial, keys), style=STYLES.get(trial.state, ""))
        self.console.print()
        self.console.print(table, soft_wrap=not self.console.is_terminal)
        if len(trials) > MOST_ROWS:
            self.say(f"and {len(trials) - MOST_ROWS} more")
        self.say(f"\nthe sweep  {self.folder.path}")

    def ranked(self) -> list[Trial]:
        """The best by the first objective on top, those without a value below."""
        direction = next(iter(self.asked.goals.values()))
        sign = 1 if direction is Direction.minimize else -1
        with_value = [trial for trial in self.all.trials if trial.values]
        rest = [trial for trial in self.all.trials if not trial.values]
        with_value.sort(key=lambda trial: sign * (trial.values or [0.0])[0])
        return with_value + sorted(rest, key=lambda trial: trial.state)

    def cells(self, trial: Trial, keys: list[str]) -> list[str]:
        shown = [f"{value:.4f}" for value in trial.values or ()]
        shown += [""] * (len(self.asked.goals) - len(shown))
        params = [str(trial.params.get(key, "")) for key in keys]
        return [str(trial.number), trial.state, *shown, *params]


def words_of(trial: Trial) -> str:
    """What tells a trial from the others."""
    return " ".join(f"{key}={written(value)}" for key, value in trial.params.items())


def written(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
