"""Where a step's time goes: `python -m benchmarks.step_profile WORK`, a work of benchmarks.speed.

Forward and backward of our model on random tokens, or of the loss alone (`vocabulary_loss`), by
torch's profiler: the operations that take most, in milliseconds. Run it with nothing else at work.
Writes results/<date>-<machine>/profile_<WORK>.md.
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts import vocabulary
from benchmarks.speed import ALONE, COMMON, HERE, WORKS
from launchers.local import shared_environment
from llmtrain.compose import composed
from llmtrain.folder import write_text
from llmtrain.hardware import cpu_name, cpu_prefers_bf16, num_cores
from llmtrain.kernel import mixers, products
from llmtrain.kernel.cross_entropy import cross_entropy_of
from llmtrain.objective import objective_of
from llmtrain.plan import make_plan
from llmtrain.training import library_settings

STEPS = 5
ROWS = 15


def main(name: str) -> None:
    what, step = vocabulary_loss() if name == "vocabulary_loss" else micro_batch(name)
    lines = [f"# {name}: {cpu_name()}, {date.today()}", ""]
    lines += [f"`python -m benchmarks.step_profile {name}`", "", *profiled(what, step)]
    folder = HERE / "results" / f"{date.today()}-{platform.machine()}"
    write_text(folder / f"profile_{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def micro_batch(name: str) -> tuple[str, Callable[[], None]]:
    """A micro-batch of a work as the plan has it, in memory as ranks have it."""
    (work,) = (work for work in WORKS if work.name == name)
    config = composed([*work.words, *COMMON, f"hardware={work.hardware}"])
    told = shared_environment(num_cores()) | library_settings(config, "cpu") | ALONE
    if "LD_PRELOAD" in told and "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", __spec__.name, name], os.environ | told)
    plan = make_plan(config)
    torch.set_num_threads(plan.threads_per_rank)
    torch.manual_seed(0)
    model = config.model.build(getattr(torch, plan.dtype_name), plan.attention).train()
    mixers.install(model.config.model_type, plan.scan_kernel or "transformers", config.cache)
    if plan.has_wide_products:
        products.install()
    objective = objective_of(model, config.mode)
    shape = (plan.micro_batch, plan.seq_len + 1)
    tokens_BL = torch.randint(model.config.vocab_size, shape)

    def step() -> None:
        batch = {"input_ids": tokens_BL[:, :-1].clone(), "labels": tokens_BL[:, 1:].clone()}
        objective(batch).loss_sum.backward()
        model.zero_grad()

    return f"a micro-batch of {plan.micro_batch} x {plan.seq_len} tokens", step


def vocabulary_loss() -> tuple[str, Callable[[], None]]:
    """The loss of benchmarks.parts."""
    torch.set_num_threads(num_cores())
    if not cpu_prefers_bf16():
        products.install()
    head, features_TD, labels_T = vocabulary()

    def step() -> None:
        cross_entropy_of(head, features_TD, labels_T).backward()

    return f"{len(labels_T):,} tokens x {head.out_features:,} words", step


def profiled(what: str, step: Callable[[], None]) -> list[str]:
    """The time of a step, and the operations that take most of it."""
    seconds = []
    for _ in range(STEPS + 1):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    lines = [f"{1e3 * median(seconds[1:]):.0f} ms forward and backward, {what}. Of these, with"]
    lines += ["the profiler at work:", "", "| ms | calls | operation |", "|--:|--:|---|"]
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return lines + [
        f"| {event.self_cpu_time_total / 1e3:.1f} | {event.count} | {event.key} |"
        for event in events[:ROWS]
    ]


if __name__ == "__main__":
    main(sys.argv[1])
