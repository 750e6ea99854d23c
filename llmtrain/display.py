"""What a user sees of a run: a live bar while it trains, and the closing summary."""

import shlex
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from llmtrain.config import load
from llmtrain.folder import RunFolder
from llmtrain.metrics import read_records
from llmtrain.plan import Plan

LEAST_FREE_BYTES = 2**16  # with less a disk is full
LEAST_XZ_BYTES = 10_000  # of a shorter text most is xz's own header


class Progress:
    """Follows a run by its folder: a bar on a terminal, a line for each record elsewhere."""

    def __init__(self, folder: RunFolder, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.console = Console()
        self.num_shown = len(read_records(folder.metrics))
        self.position = folder.metrics.stat().st_size if folder.metrics.exists() else 0
        self.num_rollbacks = 0
        self.latest: dict[str, Any] = {}
        self.warnings: list[str | None] = [None, None]
        self.was_full = False
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            transient=True,
            auto_refresh=False,  # by a thread, which ranks that are forked from here would lose
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("starting", total=plan.num_steps, figures="")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.refresh()
        self.bar.stop()

    def refresh(self) -> None:
        """Show what the folder says now."""
        for record in self.new_records():
            self.latest |= record
            if not self.console.is_terminal or "rollback" in record:
                self.console.print(line_of(record, self.plan), soft_wrap=True)
        self.warn_of_full_disk()
        status = self.folder.read_status()
        self.show_warnings([status.get("warning"), read_if_there(self.folder.tracker_warning)])
        step = max(status.get("step", 0), self.latest.get("step", 0))
        description = status.get("phase") or f"step {step:,}/{self.plan.num_steps:,}"
        self.bar.update(
            self.task,
            completed=step,
            description=description,
            figures=figures(self.latest, self.plan),
            refresh=True,
        )

    def show_warnings(self, warnings: list[str | None]) -> None:
        """Say what is new since the last look."""
        for warning, before in zip(warnings, self.warnings, strict=True):
            if warning not in (None, before):
                self.console.print(f"warning: {warning}", soft_wrap=True, markup=False)
        self.warnings = warnings

    def warn_of_full_disk(self) -> None:
        """Say it here: there is no room for anybody else to."""
        is_full = shutil.disk_usage(self.folder.path).free < LEAST_FREE_BYTES
        if is_full and not self.was_full:
            self.console.print(
                f"warning: the disk of {self.folder.path} is full; records wait, and no checkpoint "
                "can be saved until there is room.",
                soft_wrap=True,
                markup=False,
            )
        self.was_full = is_full

    def new_records(self) -> list[dict[str, Any]]:
        """The records since the last look; a resume or rollback may have made the file shorter."""
        size = self.folder.metrics.stat().st_size if self.folder.metrics.exists() else 0
        if size == self.position:
            return []
        records = read_records(self.folder.metrics)
        first = self.num_shown if size > self.position else len(records)
        for index, record in enumerate(records):
            if record.get("rollback", 0) > self.num_rollbacks:
                first, self.num_rollbacks = min(first, index), record["rollback"]
        self.position, self.num_shown = size, len(records)
        return records[first:]


def read_if_there(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def figures(record: dict[str, Any], plan: Plan) -> str:
    """The figures of the bar."""
    if "loss" not in record:
        return ""
    held_out = f"  held-out {record['eval_loss']:.3f}" if "eval_loss" in record else ""
    loss = f"loss {shown(record['loss'], 3)}{held_out}"
    return f"{loss}  {record['tokens_per_second']:,.0f} tok/s  {beside_the_plan(record, plan)}"


def line_of(record: dict[str, Any], plan: Plan) -> str:
    """One record as a line of text."""
    step = f"step {record['step']:>6,}/{plan.num_steps:,}"
    if "rollback" in record:
        return rollback_line(record)
    if "eval_loss" in record:
        bits = record["eval_bits_per_byte"]
        return f"{step}  held-out loss {record['eval_loss']:.4f}  {bits:.4f} bits per byte"
    mfu = f"  MFU {record['mfu']:.0%}" if record["mfu"] is not None else ""
    return (
        f"{step}  loss {shown(record['loss'], 4)}  lr {record['lr']:.2e}  "
        f"{record['tokens_per_second']:,.0f} tok/s{mfu}  {beside_the_plan(record, plan)}"
    )


def rollback_line(record: dict[str, Any]) -> str:
    """What went wrong, and from where the run goes on."""
    skipped = record["skipped_data_steps"]
    data = f", past the data of {skipped:,} steps" if skipped else ""
    return f"{record['reason']}; back to step {record['to_step']:,}{data}"


def shown(loss: float | None, num_digits: int) -> str:
    """A loss, where any step since the last record had one."""
    return "not finite" if loss is None else f"{loss:.{num_digits}f}"


def beside_the_plan(record: dict[str, Any], plan: Plan) -> str:
    """Peak memory and time left as they are measured, and in brackets as they were planned."""
    num_left = plan.num_steps - record["step"]
    left = clock(num_left * record["step_seconds"])
    planned = ""
    if plan.total_hours is not None:
        planned = f" ({clock(num_left / plan.num_steps * plan.total_hours * 3600)})"
    peak = plan.memory["device_peak_gib"]
    return f"{record['memory_gib']:.2f} GiB ({peak:.2f})  {left} left{planned}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds; hours may be many."""
    return f"{int(seconds // 3600):02}:{time.strftime('%M:%S', time.gmtime(seconds))}"


def show_growth(folder: RunFolder, plan: Plan, console: Console | None = None) -> None:
    """Print what memory was planned for, and what was measured over the steps."""
    table = Table("GiB", "planned", "measured", title="memory", title_justify="left")
    for name, gib in plan.memory["components"].items():
        table.add_row(name, f"{gib:.2f}")
    table.add_row("peak", f"{plan.memory['device_peak_gib']:.2f}", end_section=True)
    for record in spread([r for r in read_records(folder.metrics) if "loss" in r]):
        table.add_row(f"up to step {record['step']:,}", "", f"{record['memory_gib']:.2f}")
    (console or Console()).print(table)


def spread(records: list[dict[str, Any]], most: int = 5) -> list[dict[str, Any]]:
    """Records from all over, the first and the last among them."""
    every = max(1, -(-len(records) // (most - 1)))
    return [*records[:-1:every], *records[-1:]]


def show_summary(
    folder: RunFolder, summary: dict[str, Any], console: Console | None = None
) -> None:
    """Print how the run ended and what to do next."""
    from rich.markup import escape

    console = console or Console()
    console.print()
    loss, bits = summary["eval_loss"], summary["eval_bits_per_byte"]
    console.print(f"[bold]held-out loss {loss:.4f}[/], perplexity {summary['eval_perplexity']:.2f}")
    console.print(f"[bold]{bits:.4f} bits per byte[/]{compared(summary)}", soft_wrap=True)
    console.print(
        f"{summary['num_tokens']:,} tokens in {summary['num_steps']:,} steps, "
        f"{summary['elapsed_seconds']:.0f} s, {summary['tokens_per_second']:,.0f} tok/s, "
        f"{summary['memory_gib']:.2f} GiB",
        soft_wrap=True,
    )
    if summary.get("ended_by"):
        reason = f"Ended early by {summary['ended_by']}"
        console.print(reason, soft_wrap=True, markup=False)
    for when in ("before", "after"):
        console.print(f"\n[bold]{when} training[/]")
        text = f"[dim]{escape(summary['sample_prompt'])}[/]{escape(summary['sample_' + when])}"
        console.print(text, soft_wrap=True, highlight=False)
    console.print(f"\n[bold]the model[/]  {folder.final}")
    prompt = summary["sample_prompt"].strip().split("\n")[-1][:24]
    longer, is_dialogue = 10 * summary["num_tokens"], summary.get("is_dialogue", False)
    commands = escape(next_commands(folder, prompt, longer, is_dialogue))
    console.print(f"\n[bold]next[/]\n{commands}", soft_wrap=True, highlight=False)


def compared(summary: dict[str, Any]) -> str:
    """How the model's bits per byte stand beside those of xz on the same text."""
    xz = summary["xz_bits_per_byte"]
    if xz is None or summary["held_out_bytes"] < LEAST_XZ_BYTES:
        return ""
    size = f"{summary['held_out_bytes'] / 1e3:,.0f} kB"
    part = f"the same {size}" if summary["held_out_is_whole"] else f"all {size} of held-out text"
    verdict = "better" if summary["eval_bits_per_byte"] < xz else "not better"
    return f" of held-out text; xz -9 takes {xz:.4f} for {part}: {verdict}"


def next_commands(folder: RunFolder, prompt: str, num_tokens: int, is_dialogue: bool) -> str:
    """The three commands that make sense after a run; the last is the run itself, but longer."""
    longer = shlex.join(["python", "-m", "llmtrain.run", *longer_words(folder, num_tokens)])
    talk = "--chat" if is_dialogue else f"--prompt {shlex.quote(prompt)}"
    judge = f"  python -m llmtrain.evaluate {folder.path}"
    return "\n".join(
        [
            f"  python -m llmtrain.generate {folder.path} {talk}",
            judge if is_dialogue else f"  tensorboard --logdir {folder.path.parent}",
            f"  {longer}",
        ]
    )


def longer_words(folder: RunFolder, num_tokens: int) -> list[str]:
    """A run's words with another horizon in place of theirs, or of its experiment's."""
    given = shlex.split(folder.overrides.read_text())
    kept = [word.lstrip("+") for word in given if not word.startswith("train.max_")]
    train = load(folder.config).train
    set_elsewhere = [
        f"train.{name}=null"
        for name in ("max_steps", "max_epochs")
        if getattr(train, name) and not any(word.startswith(f"train.{name}=") for word in given)
    ]
    return [*kept, *set_elsewhere, f"train.max_tokens={num_tokens:.1g}"]
