"""Parts of training on a CPU beside what they replace: scans, attention, losses, loader, start.

    python -m benchmarks.parts --peers FOLDER/bin/python [--blocks 5]

The environment is that of benchmarks.speed. Contestants take turns and the median over blocks
counts. Writes results/<date>-<machine>/parts.json and .md.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from math import isnan
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from benchmarks import speed
from llmtrain.compose import composed
from llmtrain.data.order import step_sequences
from llmtrain.data.sequences import TokenSequences
from llmtrain.data.shards import prepare
from llmtrain.folder import finite, write_json, write_text
from llmtrain.hardware import cpu_name, cpu_prefers_bf16, num_cores
from llmtrain.kernel import products
from llmtrain.kernel.block_attention import block_attention
from llmtrain.kernel.cross_entropy import cross_entropy_of
from llmtrain.live import LiveTensors

HERE = Path(__file__).parent
MIB = 2**20
STAGES = {  # of a start, and what a run folder gets at the end of each
    "composed and planned": "config.yaml",
    "libraries imported, engine built": "environment.json",
    "sample written": "samples.jsonl",
    "step taken": "metrics.jsonl",
}


@dataclass
class Row:
    """A part: what ours takes, what that which it replaces does, and the goal."""

    name: str
    ours: float
    other: float
    unit: str
    goal: str = ""
    is_met: bool | None = None  # where there is a goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    rows = [*vocabulary_rows(options.blocks), *attention_rows(options.blocks), *loader_rows()]
    rows += start_rows(options)
    folder = options.out / f"{date.today()}-{platform.machine()}"
    write_json(folder / "parts.json", {"machine": cpu_name(), "rows": [known(r) for r in rows]})
    text = page(rows)
    write_text(folder / "parts.md", text)
    print(text)


def known(row: Row) -> dict[str, Any]:
    """A row as JSON has it."""
    return {name: finite(value) for name, value in vars(row).items()}


def taking_turns(blocks: int, *calls: Callable[[], Any]) -> list[float]:
    """The median seconds of each call; the first block warms up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for block in range(blocks + 1):
        for call, found in zip(calls, seconds, strict=True):
            begun = time.perf_counter()
            call()
            if block:
                found.append(time.perf_counter() - begun)
    return [median(found) for found in seconds]


@contextmanager
def as_planned() -> Iterator[bool]:
    """What a plan chooses for this CPU's products: whether they are made in fp32."""
    is_wide = not cpu_prefers_bf16()
    if is_wide:
        products.install()
    yield is_wide
    products.uninstall()


def peak_mib(call: Callable[[], Any], is_wide: bool = False) -> float:
    """The most that lives at once of what a call makes."""
    gc.collect()
    account = LiveTensors(is_wide)
    with account:
        call()
    return account.peak_bytes / MIB


def vocabulary(
    tokens: int = 4096, words: int = 16384, width: int = 384
) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    """A head, features of some tokens and their labels."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, words, bias=False, dtype=torch.bfloat16)
    features_TD = torch.randn(tokens, width).bfloat16().requires_grad_()
    return head, features_TD, torch.randint(words, (tokens,))


def vocabulary_rows(blocks: int) -> Any:
    """Loss and gradients over a vocabulary, against torch's over all logits at once."""
    head, features_TD, labels_T = vocabulary()
    tokens, words = len(labels_T), head.out_features

    def whole() -> None:
        cross_entropy(head(features_TD).float(), labels_T, reduction="sum").backward()

    def chunked() -> None:
        with as_planned():
            cross_entropy_of(head, features_TD, labels_T).backward()

    ours, other = taking_turns(blocks, chunked, whole)
    name = f"vocabulary loss, {tokens:,} tokens x {words:,}"
    yield Row(name, ours, other, "s", "at most 0.45 s", ours <= 0.45)
    logits_mib = tokens * words * 2 / MIB
    gradients_mib = (features_TD.nbytes + head.weight.nbytes) / MIB
    peaks = peak_mib(chunked, not cpu_prefers_bf16()), peak_mib(whole)
    ours, other = (peak - 2 * gradients_mib for peak in peaks)
    goal = f"at most 1/8 of the {logits_mib:.0f} MiB of bf16 logits beside the gradients"
    yield Row(f"{name}: memory", ours, other, "MiB", goal, ours <= logits_mib / 8)


def attention_rows(blocks: int) -> Any:
    """Causal attention there and back, against torch's fused one."""
    for batch, heads, length, width in ((8, 6, 512, 64), (4, 12, 1024, 64), (1, 6, 2048, 64)):
        torch.manual_seed(0)
        shape = (batch, length, heads, width)
        leaves = [torch.randn(shape).bfloat16().transpose(1, 2) for _ in range(3)]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        given = torch.randn(shape).bfloat16().transpose(1, 2)

        def by_blocks(leaves: Any = leaves, given: Tensor = given) -> None:
            block_attention(*leaves, 0.125).backward(given)

        def fused(leaves: Any = leaves, given: Tensor = given) -> None:
            scaled_dot_product_attention(*leaves, is_causal=True).backward(given)

        ours, other = taking_turns(blocks, by_blocks, fused)
        name = f"causal attention, {batch} x {heads} x {length} x {width}"
        yield Row(name, ours, other, "s", "faster", ours < other)


def loader_rows() -> Any:
    """Tokens/s that a rank's batches can be read at, against what the work of 20M consumes."""
    work = speed.WORKS[0]
    config = composed([*work.words, *speed.COMMON, "hardware=cpux1"])
    manifest = prepare(config.data, config.cache, config.tokenizer_path, progress=False)
    length, batch = config.train.seq_len, config.train.global_batch
    sequences = TokenSequences(manifest, "train", length)
    steps = 50
    begun = time.perf_counter()
    for step in range(steps):
        sequences.batch(step_sequences(0, step, batch, len(sequences)))
    seconds = (time.perf_counter() - begun) / steps
    tokens_per_second = batch * length / seconds
    stored = HERE / "results" / f"{date.today()}-{platform.machine()}" / "speed.json"
    used = json.loads(stored.read_text())["works"][work.name]["rows"][speed.OURS]
    times = tokens_per_second / used["tokens_per_second"]
    goal = "at least 100 times what the model consumes"
    yield Row("loader", tokens_per_second, used["tokens_per_second"], "tok/s", goal, times >= 100)
    share = seconds / median(used["seconds"])
    yield Row("loader: its share of a step", share, 1.0, "", "under 0.1 %", share < 1e-3)


def start_rows(options: argparse.Namespace) -> Any:
    """From the command to the end of the first optimizer step, caches warm."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as scratch:
        arena = speed.Arena(speed.WORKS[0], Path(scratch), options)
        contestant = arena.enter(speed.OURS)  # leaves weights and tokens for the trainer
        contestant.end()
        for block in range(options.blocks):
            ours.append(start_of_ours(Path(scratch), block))
            begun = time.perf_counter()
            contestant = arena.enter(speed.TRAINER)
            contestant.train(1)
            theirs.append(time.perf_counter() - begun)
            contestant.end()
    until = {stage: median(times[stage] for times in ours[1:]) for stage in STAGES}
    found, other = until["step taken"], median(theirs[1:])
    goal = "not slower than the HF Trainer's script, and at most 15 s"
    yield Row("command to first step", found, other, "s", goal, found <= min(other, 15))
    for stage, seconds in until.items():
        yield Row(f"command to {stage}", seconds, float("nan"), "s")
    command = [sys.executable, "-m", "llmtrain.run", "--help"]
    (seconds,) = taking_turns(options.blocks, lambda: subprocess.run(command, capture_output=True))
    yield Row("--help", seconds, float("nan"), "s", "under 1 s", seconds < 1)


def start_of_ours(scratch: Path, block: int) -> dict[str, float]:
    """Seconds from the command to the end of each stage."""
    root = scratch / f"start_{block}"
    words = [*speed.WORKS[0].words, *speed.COMMON, "hardware=cpux1", f"output_root={root}"]
    begun = time.time()  # the clock of files
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain.run", *words], stdout=subprocess.DEVNULL
    )
    while not any(path.stat().st_size for path in root.glob("*/metrics.jsonl")):
        time.sleep(0.01)
        if process.poll() is not None:
            sys.exit("the run ended before its first step")
    (folder,) = root.iterdir()
    ends = {stage: (folder / name).stat().st_mtime for stage, name in STAGES.items()}
    process.terminate()
    process.wait()
    return {stage: end - begun for stage, end in ends.items()}


def page(rows: list[Row]) -> str:
    """The table in Markdown."""
    lines = [f"# Parts: {cpu_name()}, {date.today()}", "", "`python -m benchmarks.parts`", ""]
    lines += ["| part | ours | instead | goal | |", "|---|--:|--:|---|---|"]
    for row in rows:
        values = (
            "" if isnan(value) else f"{value:,.4g} {row.unit}" for value in (row.ours, row.other)
        )
        ours, other = (value.strip() for value in values)
        said = "" if row.is_met is None else "met" if row.is_met else "missed"
        lines.append(f"| {row.name} | {ours} | {other} | {row.goal} | {said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
