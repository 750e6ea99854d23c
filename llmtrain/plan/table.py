"""A plan as a table: what was decided, and why."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmtrain.errors import ConfigError
from llmtrain.plan.propose import duration, figure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llmtrain.plan.propose import Proposal
    from llmtrain.plan.record import Plan

MOST_WAYS = 3
WIDE = 400  # columns, where no terminal says how many there are

DOCUMENTS_SHARED = "those of one sequence see each other: usual for pretraining"


def show_plan(
    plan: "Plan", found: "Sequence[Proposal]" = (), console: "Console | None" = None
) -> None:
    """Print the plan as tables: each choice with its reason, memory, other ways, proposals."""
    console = console or console_of()
    table = columns(plan.name, "planned", "why")
    for name, value, reason in rows(plan):
        table.add_row(name, value, plan.reasons.get(reason, reason))
    console.print(table)
    if not plan.fits:
        console.print(f"[red]does not fit:[/] {plan.refusal}")
    console.print(memory_table(plan))
    if len(plan.alternatives):
        console.print(ways_table(plan))
    for proposal in found:
        console.print(f"[green]could be:[/] {proposal.line(plan)}")
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def console_of() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDE, soft_wrap=not sys.stdout.isatty())


def columns(title: str, *names: str) -> "Table":
    """A table without lines: a first column in bold, a last one that is dim."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("what", style="bold")
    for name in names[:-1]:
        table.add_column(name, overflow="fold")
    table.add_column(names[-1], style="dim", overflow="fold")
    return table


def memory_table(plan: "Plan") -> "Table":
    """What takes memory at the peak, the largest first."""
    memory = plan.memory
    table = columns(f"\nMemory at its peak, in the {memory['moment']}", "GiB", "")
    parts = memory["components"].items()
    for name, gib in sorted(parts, key=lambda part: (part[0].startswith("host "), -part[1])):
        if gib >= 0.005:
            table.add_row(name, f"{gib:.2f}", "")
    table.add_row("a device", f"{memory['device_peak_gib']:.2f}", of_device(plan))
    if memory["host_peak_gib"]:
        ranks = f"times {plan.gpus_per_node} ranks of a node" if plan.gpus_per_node > 1 else ""
        table.add_row("a rank on the host", f"{memory['host_peak_gib']:.2f}", ranks)
    if memory["disk_gib"]:
        table.add_row("a rank on the disk", f"{memory['disk_gib']:.2f}", str(plan.nvme_path))
    return table


def of_device(plan: "Plan") -> str:
    """What the peak is to be compared with."""
    if plan.device == "cpu":
        return "a process, its imports beside"
    reserved = plan.memory["reserved_gib"]
    return f"and {reserved:.1f} for CUDA and its allocator, of {plan.memory_gib:.1f}"


def ways_table(plan: "Plan") -> "Table":
    """The other ways to spread the run: the three best that fit, then why the rest was refused."""
    table = columns("\nOther ways", "batch", "GiB", "s a step", "refused")
    fitting = [way for way in plan.alternatives if way["refusal"] is None]
    refused = [way for way in plan.alternatives if way["refusal"] is not None]
    for way in fitting[:MOST_WAYS] + refused:
        seconds = way["step_seconds"]
        table.add_row(
            way_name(way),
            str(way["micro_batch"]),
            f"{way['device_peak_gib']:.1f}",
            figure(seconds) if seconds is not None else "",
            way["refusal"] or "",
        )
    return table


def way_name(way: dict[str, Any]) -> str:
    """``stage 2, optimizer on cpu, recompute full``."""
    name = f"stage {way['zero_stage']}"
    if way["offload_optimizer"] != "none":
        name += f", optimizer on {way['offload_optimizer']}"
    if way["offload_params"] != "none":
        name += f", weights on {way['offload_params']}"
    recompute = way["activation_checkpointing"]
    return name + (f", recompute {recompute}" if recompute != "none" else "")


def show_grid(points: "Sequence[tuple[list[str], Plan | ConfigError]]") -> None:
    """Print one row a point, so that they can be compared."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in GRID:
        table.add_column(name, overflow="fold", justify="right" if name in NUMBERS else "left")
    for words, plan in points:
        table.add_row(*grid_row(words, plan))
    console_of().print(table)


GRID = (
    "point",
    "fits",
    "batch",
    "spread",
    "GiB",
    "host GiB",
    "s a step",
    "tokens/s",
    "hours",
    "why",
)
NUMBERS = ("GiB", "host GiB", "s a step", "tokens/s", "hours")


def grid_row(words: list[str], plan: "Plan | ConfigError") -> list[str]:
    point = " ".join(words)
    if isinstance(plan, ConfigError):
        return [point, "[red]no[/]", *[""] * 7, escaped(str(plan))]
    fits = "[green]yes[/]" if plan.fits else "[red]no[/]"
    batch = f"{plan.micro_batch}x{plan.grad_accum}x{plan.world_size}"
    seconds, hours = plan.step_seconds, plan.total_hours
    return [
        point,
        fits,
        batch,
        f"{plan.precision}, {way_name(vars(plan))}",
        f"{plan.memory['device_peak_gib']:.1f}",
        f"{plan.memory['host_peak_gib']:.1f}",
        figure(seconds) if seconds else "",
        f"{plan.tokens_per_step / seconds:,.0f}" if seconds else "",
        figure(hours) if hours else "",
        plan.refusal or "",
    ]


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def rows(plan: "Plan") -> list[tuple[str, str, str]]:
    """(what, value, reason or the name of a reason) of each line of the table."""
    active = f", {plan.num_active_parameters:,} active" if active_differs(plan) else ""
    where = f"{plan.world_size} x {plan.device if plan.device == 'cpu' else plan.device_name}"
    offload = f", optimizer on {plan.offload_optimizer}" if plan.offload_optimizer != "none" else ""
    offload += f", weights on {plan.offload_params}" if plan.offload_params != "none" else ""
    measured = "an estimate until it is tokenised" if plan.data.is_estimate else "counted"
    rows_of = f" in {plan.data.num_rows:,} rows" if plan.data.num_rows is not None else ""
    batch = f"{plan.global_batch} x {plan.seq_len} tokens"
    split = f"{plan.micro_batch} x {plan.grad_accum} accumulated x {plan.world_size} ranks"
    found = [
        ("hardware", where, plan.device_name if plan.device == "cpu" else ""),
        ("model", f"{plan.model}, {plan.num_parameters:,} parameters{active}", ""),
        ("data", f"{plan.data.name}, {plan.data.num_train_tokens:,} tokens{rows_of}", measured),
        ("steps", f"{plan.num_steps:,}, each of {batch}", "num_steps"),
        ("tokens", f"{plan.num_tokens:,} ({plan.num_epochs:.2f} epochs)", ""),
        ("batch", split, "micro_batch"),
        ("optimizer", f"{plan.optimizer}, learning rate {plan.learning_rate:g}", ""),
        ("warm-up", f"{plan.warmup_steps} steps", "warmup_steps"),
        ("precision", plan.precision, "precision"),
        ("ZeRO", f"stage {plan.zero_stage}{offload}", "zero_stage"),
        ("recomputation", plan.activation_checkpointing, "activation_checkpointing"),
        ("attention", plan.attention, "attention"),
    ]
    if plan.adapter != "none":
        share = plan.num_trainable_parameters / plan.num_parameters
        trained = f"{plan.num_trainable_parameters:,} parameters are trained, {share:.2%}"
        found.insert(2, ("adapter", f"{plan.adapter}, {trained}", ""))
    if plan.teacher:
        found.insert(2, ("teacher", plan.teacher, ""))
    if plan.has_wide_products:
        found.append(("products", "in fp32, rounded to bf16", "has_wide_products"))
    if plan.scan_kernel:
        found.append(("scan", plan.scan_kernel, "scan_kernel"))
    if plan.step_seconds and plan.total_hours:
        rate = plan.tokens_per_step / plan.step_seconds
        hours = f"{figure(plan.step_seconds)} s a step, {duration(plan.total_hours)} in all"
        found.append(("time", hours, f"{rate:,.0f} tokens/s"))
        if plan.device == "cuda":
            found.append(("cost", cost(plan), "of the devices; hardware.price_per_hour prices it"))
    found.append(
        ("arithmetic", f"{plan.flops_per_token:.3g} FLOPs a token", "matrix products only")
    )
    found.append(("documents", *documents(plan)))
    found.append(
        ("evaluation", f"every {plan.eval_every} steps", f"{plan.eval_sequences} sequences")
    )
    behind = "while training goes on" if plan.saves_behind else "training waits for it"
    found.append(("checkpoint", f"every {plan.checkpoint_every} steps", behind))
    return found


def cost(plan: "Plan") -> str:
    """GPU-hours, and kWh and money where they are known."""
    parts = [f"{figure(plan.gpu_hours or 0.0)} GPU-hours"]
    if plan.energy_kwh is not None:
        parts.append(f"{figure(plan.energy_kwh)} kWh")
    if plan.money is not None:
        parts.append(f"{figure(plan.money)} of the price's currency")
    return ", ".join(parts)


def documents(plan: "Plan") -> tuple[str, str]:
    """How documents lie in sequences, and what that means."""
    if not plan.packing:
        return "one a sequence", "a batch is as wide as its longest"
    if not plan.keep_documents_apart:
        return "packed, not kept apart", DOCUMENTS_SHARED
    fill = plan.data.tokens_per_sequence / plan.seq_len
    filled = "" if plan.data.is_estimate else f" {fill:.1%} full"
    return f"packed{filled}, kept apart", "a token sees its own document"


def active_differs(plan: "Plan") -> bool:
    return plan.num_active_parameters != plan.num_parameters
