"""A plan as a table: what was decided, and why."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from llmtrain.plan import Plan

DOCUMENTS_SHARED = "those of one sequence see each other: usual for pretraining"


def show_plan(plan: "Plan", console: "Console | None" = None) -> None:
    """Print the plan as a table, with the reason of each choice."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=plan.name, title_justify="left", box=None, pad_edge=False)
    table.add_column("what", style="bold")
    table.add_column("planned", overflow="fold")
    table.add_column("why", style="dim", overflow="fold")
    for name, value, reason in rows(plan):
        table.add_row(name, value, plan.reasons.get(reason, reason))
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def rows(plan: "Plan") -> list[tuple[str, str, str]]:
    """(what, value, reason or the name of a reason) of each line of the table."""
    active = f", {plan.num_active_parameters:,} active" if active_differs(plan) else ""
    where = f"{plan.world_size} x {plan.device}"
    offload = f", optimizer on {plan.offload_optimizer}" if plan.offload_optimizer != "none" else ""
    offload += f", weights on {plan.offload_params}" if plan.offload_params != "none" else ""
    measured = "an estimate until it is tokenised" if plan.data.is_estimate else "counted"
    rows_of = f" in {plan.data.num_rows:,} rows" if plan.data.num_rows is not None else ""
    batch = f"{plan.global_batch} x {plan.seq_len} tokens"
    split = f"{plan.micro_batch} x {plan.grad_accum} accumulated x {plan.world_size} ranks"
    found = [
        ("hardware", where, plan.device_name),
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
    if plan.scan_kernel:
        found.append(("scan", plan.scan_kernel, "scan_kernel"))
    peak = f"about {plan.memory['device_peak_gib']:.2f} GiB a device"
    peak += ", imports beside" if plan.device == "cpu" else ""
    found.append(("memory", peak, components(plan)))
    found.append(
        ("arithmetic", f"{plan.flops_per_token:.3g} FLOPs a token", "matrix products only")
    )
    found.append(("documents", *documents(plan)))
    found.append(
        ("evaluation", f"every {plan.eval_every} steps", f"{plan.eval_sequences} sequences")
    )
    found.append(("checkpoint", f"every {plan.checkpoint_every} steps", ""))
    return found


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


def components(plan: "Plan") -> str:
    parts = plan.memory["components"].items()
    return ", ".join(f"{name} {value:.2f}" for name, value in parts if value >= 0.005)
