"""What is recorded of a run on the way and at its end."""

import math
import time
from pathlib import Path
from typing import Any

from llmtrain import checkpoint
from llmtrain.metrics import read_records
from llmtrain.rank_run import Run, Sums
from llmtrain.throughput import model_flops_utilisation


def log_step(run: Run) -> None:
    """One record of what happened since the last one."""
    sums = run.sums
    total, applied = run.sum(float(sums.loss)), sums.steps - sums.skipped
    loss = total / sums.tokens if sums.tokens else math.nan  # no step was applied
    extras = {name: run.sum(float(value)) / applied for name, value in sums.extras.items()}
    norm = gradient_norm(run)
    seconds = time.perf_counter() - sums.start
    run.elapsed_seconds += seconds
    rate = sums.steps * run.plan.tokens_per_step / seconds
    values = {
        "step": run.step,
        "loss": loss,
        "lr": run.engine.optimizer.param_groups[0]["lr"],
        "grad_norm": None if norm is None else float(norm),
        "skipped_steps": run.stability.num_skipped,
        "tokens": run.step * run.plan.tokens_per_step,
        "tokens_per_second": rate,
        "samples_per_second": sums.sequences / seconds,
        "mfu": model_flops_utilisation(rate, run.plan.flops_per_token, run.peak_tflops),
        "memory_gib": peak_memory_gib(run),
        "step_seconds": seconds / sums.steps,
        "elapsed_seconds": run.elapsed_seconds,
        **extras,
    }
    run.record(values)
    run.sums = Sums(start=time.perf_counter())


def gradient_norm(run: Run) -> Any:
    """The last step's gradient norm, before clipping and without loss scale; None: unknown.

    A number, or a tensor on the device that nothing has waited for.
    """
    norm = run.engine.get_global_grad_norm()
    if norm is None:
        return None
    scale = checkpoint.scaler(run.engine)
    has_scale = run.plan.precision == "fp16" and run.plan.zero_stage == 0
    return norm / (scale.cur_scale if has_scale else 1.0)


def peak_memory_gib(run: Run) -> float:
    """The highest use so far: allocated on a GPU, resident beyond the imports on a CPU."""
    import torch

    if run.plan.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resident_gib("VmHWM") - _imports_gib


_imports_gib = 0.0


def start_count() -> None:
    """Count this process's resident memory from here on, as it is now."""
    global _imports_gib
    _imports_gib = resident_gib("VmRSS")
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark


def resident_gib(name: str) -> float:
    """A figure of this process in /proc; NaN on a system that has none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    values = [int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{name}:")]
    return values[0] if values else math.nan


def summarise(run: Run, values: dict[str, float]) -> dict[str, Any]:
    """What the closing summary shows."""
    samples = read_records(run.folder.samples)
    steps = [record for record in read_records(run.folder.metrics) if "loss" in record]
    plan, num_tokens = run.plan, run.step * run.plan.tokens_per_step
    return {
        **values,
        "num_steps": run.step,
        "num_tokens": num_tokens,
        "ended_by": run.hooks.reason,
        "train_loss": steps[-1]["loss"],
        "tokens_per_second": num_tokens / max(run.elapsed_seconds, 1e-9),
        "mfu": steps[-1]["mfu"],
        "memory_gib": max(record["memory_gib"] or 0.0 for record in steps),
        "elapsed_seconds": run.elapsed_seconds,
        "xz_bits_per_byte": run.manifest.held_out_xz_bits_per_byte,
        "held_out_bytes": run.manifest.held_out.num_bytes,
        "held_out_is_whole": plan.final_eval_sequences * plan.seq_len
        >= run.manifest.held_out.num_tokens - 1,
        "is_dialogue": run.manifest.chat_template is not None,
        "sample_prompt": samples[-1]["prompt"],
        "sample_before": samples[0]["text"],
        "sample_after": samples[-1]["text"],
    }


def hyperparameters(run: Run) -> dict[str, Any]:
    """The settings that tell runs apart in TensorBoard."""
    plan = run.plan
    return {
        "model": plan.model,
        "optimizer": run.config.optimizer.kind,
        "lr": plan.learning_rate,
        "schedule": run.config.schedule.kind,
        "global_batch": plan.global_batch,
        "seq_len": plan.seq_len,
        "precision": plan.precision,
        "seed": run.config.seed,
        "num_parameters": plan.num_parameters,
    }
