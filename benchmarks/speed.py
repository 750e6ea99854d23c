"""Training speed side by side with what else people use, on the same weights and tokens.

    python -m benchmarks.speed --make-peers FOLDER           once: installs the peers there
    python -m benchmarks.speed --peers FOLDER/bin/python [WORK ...] [--blocks 5]

Each contestant is a process that trains when its turn comes, block after block: A B A B. A ratio is
the median over blocks, with a bootstrap interval of 95 %. The peak is a square bf16 product of
random numbers, measured in the same run, or on a CPU an fp32 product where that is faster. A peer
counts only if its losses follow those of an fp32 loop, and its gradients have a finite norm above
0. Writes results/<date>-<machine>/speed.json, .md and .png.
"""

import argparse
import json
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from datetime import date
from math import ceil, inf
from os import environ
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.speed_rank import tokens_of, weights_of
from launchers.local import shared_environment
from llmtrain.compose import composed
from llmtrain.data.shards import prepare
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.hardware import cpu_name
from llmtrain.job import Job
from llmtrain.plan import Plan, make_plan
from llmtrain.training import library_settings

HERE = Path(__file__).parent
OURS, COMPILED, PLAIN = "llmtrain", "llmtrain, compiled", "llmtrain's model in a bare loop"
TRAINER, TRAINER_COMPILED = "HF Trainer", "HF Trainer, torch_compile"
LOOP, LOOP_COMPILED, DEEPSPEED = "plain loop", "plain loop, compiled", "raw DeepSpeed"
LITGPT = "litgpt"
MAMBAPY, ASSOCIATIVE = "transformers with mambapy", "transformers, associative scan compiled"
PEERS = {
    TRAINER: "trainer",
    TRAINER_COMPILED: "trainer-compiled",
    LOOP: "loop",
    LOOP_COMPILED: "loop-compiled",
    DEEPSPEED: "deepspeed",
    LITGPT: "litgpt",
    MAMBAPY: "mambapy",
    ASSOCIATIVE: "associative",
}
ASIDE = "litgpt==0.5.13"  # asks for an older huggingface-hub, and works with this one
LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
SAME_LOSS = 1e-2  # nats, in the mean of a contestant's first steps and the reference's
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
REFERENCE_STEPS, REFERENCE_SECONDS = 6, 30.0  # whichever is over first
WARM_UP, WARM_UP_SECONDS = 2, 5.0  # steps before the first block; one where it takes longer
BLOCK_SECONDS = 4.0  # that a block of ours takes, or a step where that is longer
COMMON = [
    *("optimizer=adamw", f"optimizer.lr={LR}", f"optimizer.beta1={BETAS[0]}"),
    *(f"optimizer.beta2={BETAS[1]}", f"optimizer.weight_decay={WEIGHT_DECAY}"),
    *(f"optimizer.grad_clip={GRAD_CLIP}", "schedule=constant", "schedule.warmup_steps=0"),
    *("train.max_steps=10000", "train.eval_every=10000", "checkpoint.every=10000"),
]


def llama(width: int, layers: int, vocabulary: int) -> list[str]:
    """A Llama with heads of 64."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return ["model=llama_tiny", "model.config.head_dim=64", *overrides(sizes)]


def overrides(sizes: dict[str, int]) -> list[str]:
    return [f"++model.config.{name}={size}" for name, size in sizes.items()]


@dataclass(frozen=True)
class Work:
    """What is trained, who trains it, and how many times as fast ours should be.

    ``steps`` are the most of a block; ``slow`` contestants have one block of one step. ``goals``
    are contestants and ratios, ``peak_share`` is of the measured product's FLOP/s.
    """

    name: str
    words: list[str]
    contestants: tuple[str, ...]
    steps: int = 4
    slow: tuple[str, ...] = ()
    goals: dict[str, float] = field(default_factory=dict)
    peak_share: float | None = None
    reference: dict[str, bool] = field(default_factory=dict)  # options of its configuration
    hardware: str = "cpux1"


ACTIVE = {"num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 4}
MAMBA = (OURS, LOOP, MAMBAPY, ASSOCIATIVE)
LLAMA = (
    *(OURS, COMPILED, PLAIN),
    *(TRAINER, TRAINER_COMPILED, LOOP, LOOP_COMPILED, DEEPSPEED, LITGPT),
)
BATCH_20M = ["train.seq_len=512", "train.global_batch=8"]
BATCH_MAMBA = ["train.seq_len=256", "train.global_batch=8"]
WORKS = [
    Work(
        "llama_20m",
        [*llama(384, 8, 8192), "model.config.tie_word_embeddings=false", *BATCH_20M],
        LLAMA,
        goals={TRAINER: 2.2, "best peer": 1.2, PLAIN: 0.97},
        peak_share=0.45,
    ),
    Work(
        "llama_100m",
        [*llama(768, 12, 16384), "train.seq_len=1024", "train.global_batch=4"],
        (OURS, TRAINER, LOOP),
        goals={TRAINER: 2.0},
        peak_share=0.55,
    ),
    Work(
        "mamba_1",
        ["model=mamba_tiny", *BATCH_MAMBA],
        MAMBA,
        slow=(LOOP,),
        reference={"use_mambapy": True},  # in fp32; the default takes a minute a step
        goals={LOOP: 100, "best peer": 5},
    ),
    Work("mamba_2", ["model=mamba2_tiny", *BATCH_MAMBA], (OURS, LOOP), goals={LOOP: 2.5}),
    Work("moe", ["model=moe_tiny", *BATCH_MAMBA], (OURS, LOOP, TRAINER)),
    Work(
        "dense_as_moe",  # as many active parameters, for the share of the peak
        ["model=llama_tiny", "model.config.head_dim=64", *overrides(ACTIVE), *BATCH_MAMBA],
        (OURS, LOOP, TRAINER),
    ),
]


def main() -> None:
    assert __doc__ is not None
    measure_all(WORKS, parse_options(__doc__, WORKS), cpu_name(), platform.machine())


def measure_all(works: list[Work], options: argparse.Namespace, machine: str, place: str) -> None:
    """Measure the works that were asked for, and keep each with those that were measured before."""
    if options.make_peers:
        options.peers = make_peers(options.make_peers)
    folder = options.out / f"{date.today()}-{place}"
    stored = folder / "speed.json"
    found = json.loads(stored.read_text())["works"] if stored.exists() else {}
    for work in works:
        if not options.works or work.name in options.works:
            with tempfile.TemporaryDirectory() as scratch:
                found[work.name] = measure(work, Path(scratch), options)
            write_json(stored, {"machine": machine, "date": str(date.today()), "works": found})
            text = page(found, machine)
            write_text(stored.with_suffix(".md"), text)
            draw(found, stored.with_suffix(".png"))
            print(text, flush=True)


def parse_options(about: str, works: list[Work]) -> argparse.Namespace:
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=usage)
    peers = parser.add_mutually_exclusive_group(required=True)
    peers.add_argument("--peers", help="the interpreter of an environment that has the peers")
    peers.add_argument("--make-peers", type=Path, help="make that environment here first")
    parser.add_argument("works", nargs="*", metavar="WORK", help=", ".join(w.name for w in works))
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def make_peers(folder: Path) -> str:
    """An environment with the peers on the torch and transformers of ours; its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(folder.absolute() / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, "-r", str(HERE / "requirements-peers.txt")], check=True)
    subprocess.run([*install, "--no-deps", ASIDE], check=True)
    return python


class Contestant:
    """A process that trains when it is asked to."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path):
        self.name = name
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []
        self.seconds: list[float] = []  # of each block's step
        self.step_seconds = 0.0  # of the last step that was asked for
        self.peak_gib = 0.0
        self.log = log
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen(
            command, env=environ | environment, stderr=log.open("w"), **pipes
        )

    def hear(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended: {self.log.read_text()[-3000:]}")
        said = dict(json.loads(line))
        self.peak_gib = said["peak_gib"]
        return said

    def train(self, num_steps: int) -> float:
        """Seconds of a step."""
        print(num_steps, file=self.process.stdin, flush=True)
        said = self.hear()
        self.losses += said["losses"]
        self.gradient_norms += said["gradient_norms"]
        self.step_seconds = float(said["seconds"]) / num_steps
        return self.step_seconds

    def end(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


class Arena:
    """All contestants of a work, in a folder that is thrown away."""

    def __init__(self, work: Work, scratch: Path, options: argparse.Namespace) -> None:
        self.work = work
        self.scratch = scratch
        self.options = options
        self.ports = iter(free_ports(8))
        self.job: dict[str, Any] = {}
        self.plan: Plan | None = None

    def enter(self, name: str) -> Contestant:
        """Start a contestant and wait until it is ready; ours come first and lay the table."""
        environment: dict[str, str] = {}
        log = self.scratch / f"{name}.log"
        if name in (OURS, COMPILED, PLAIN):
            folder, environment = self.filled(name)
            how = "plain" if name == PLAIN else "engine"
            command = [sys.executable, "-m", "benchmarks.speed_rank", str(folder.path), how]
        else:
            script = HERE / "peers" / "pretrain.py"
            path = self.scratch / f"{name}.json"
            write_json(path, self.job | {"port": next(self.ports)})
            words = [PEERS.get(name, name), str(path)]
            command = [self.options.peers, str(script), *words]
        contestant = Contestant(name, command, environment, log)
        contestant.hear()
        if name == OURS:
            self.job |= {"model": str(weights_of(folder)), "tokens": str(tokens_of(folder))}
        return contestant

    def filled(self, name: str) -> tuple[RunFolder, dict[str, str]]:
        """A run's folder as `llmtrain.run` leaves it to the ranks, and what these are told."""
        words = [*self.work.words, *COMMON, f"hardware={self.work.hardware}"]
        words += [f"output_root={self.scratch / name.split()[-1]}"]
        words += ["train.compile=true"] if name == COMPILED else []
        config = composed(words)
        manifest = prepare(config.data, config.cache, config.tokenizer_path, progress=False)
        plan = make_plan(config, manifest)
        job = Job(config, plan, manifest)
        job.fill_folder()
        if name == OURS:
            self.plan = plan
            self.job = {"batch": plan.global_batch, "threads": plan.threads_per_rank}
            self.job |= {
                "device": plan.device,
                "lr": LR,
                "betas": BETAS,
                "weight_decay": WEIGHT_DECAY,
            }
            self.job |= {"reference": self.work.reference}
            self.job |= {"grad_clip": GRAD_CLIP, "scratch": str(self.scratch)}
        told = shared_environment(plan.threads_per_rank) | library_settings(config, plan.device)
        return job.folder, told | ALONE


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def measure(work: Work, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All contestants of a work, block after block."""
    arena = Arena(work, scratch, options)
    running = {OURS: ready(arena, OURS)}
    steps = max(1, min(work.steps, round(BLOCK_SECONDS / running[OURS].step_seconds)))
    names = ["reference", *(["reference-of-trainer"] if TRAINER in work.contestants else [])]
    references = {name: refer(arena, name) for name in names}
    running |= {name: ready(arena, name) for name in work.contestants if name != OURS}
    peaks = []
    for block in range(options.blocks):
        if block % 2 == 0:
            peaks.append(matmul_tflops(arena.job["device"]))
        for name, contestant in running.items():
            if name in work.slow and block:
                continue
            seconds = contestant.train(1 if name in work.slow else steps)
            contestant.seconds.append(seconds)
            print(f"{work.name}, block {block}: {name} {seconds:.3f} s a step", flush=True)
    for contestant in running.values():
        contestant.end()
    shutil.rmtree(scratch, ignore_errors=True)
    assert arena.plan is not None
    curves = {name: reference.losses for name, reference in references.items()}
    return result(work, arena.plan, running, curves, median(peaks))


def refer(arena: Arena, name: str) -> Contestant:
    """A reference's first losses. It trains alone: in fp32 it takes much memory."""
    reference = arena.enter(name)
    begun = time.monotonic()
    while len(reference.losses) < REFERENCE_STEPS and time.monotonic() - begun < REFERENCE_SECONDS:
        reference.train(1)
    reference.end()
    return reference


def ready(arena: Arena, name: str) -> Contestant:
    """A contestant that has started and warmed up."""
    begun = time.monotonic()
    contestant = arena.enter(name)
    if name not in arena.work.slow:
        for _ in range(WARM_UP):
            if contestant.train(1) > WARM_UP_SECONDS:
                break
    seconds = time.monotonic() - begun
    print(f"{arena.work.name}: {name} is ready after {seconds:.0f} s", flush=True)
    return contestant


def matmul_tflops(device: str) -> float:
    """A square product of random numbers on the whole device, in a process of its own.

    In bf16, or on a CPU in fp32 where that is faster: there ours multiplies so.
    """
    size, dtypes = (2048, "bfloat16 float32") if device == "cpu" else (8192, "bfloat16")
    script = (
        "import torch, time\n"
        "times = []\n"
        f"for dtype in '{dtypes}'.split():\n"
        f"    kind = dict(device='{device}', dtype=getattr(torch, dtype))\n"
        f"    a, b = (torch.randn({size}, {size}).to(**kind) for _ in range(2))\n"
        "    wait = torch.cuda.synchronize if a.is_cuda else lambda: None\n"
        "    for _ in range(8):\n"
        "        wait(); begun = time.perf_counter(); a @ b; wait()\n"
        "        times.append(time.perf_counter() - begun)\n"
        f"print(2 * {size}**3 / min(times) / 1e12)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return float(done.stdout)


def result(
    work: Work,
    plan: Plan,
    running: dict[str, Contestant],
    references: dict[str, list[float]],
    peak_tflops: float,
) -> dict[str, Any]:
    """The figures of a work: tokens/s, memory, agreement, ratios and goals."""
    ours, tokens = running[OURS], plan.global_batch * plan.seq_len
    rows = {}
    for name, contestant in running.items():
        is_trainer = name in (TRAINER, TRAINER_COMPILED)
        reference = references["reference-of-trainer" if is_trainer else "reference"]
        apart = np.abs(np.subtract(*cut(contestant.losses, reference))).mean()
        ratio, low, high = ratio_of(contestant.seconds, ours.seconds)
        rows[name] = {
            "seconds": contestant.seconds,
            "tokens_per_second": tokens / median(contestant.seconds),
            "peak_gib": contestant.peak_gib,
            "loss_apart": float(apart),
            "counts": bool(apart < SAME_LOSS and all(map(is_learning, contestant.gradient_norms))),
            "times_as_long_as_ours": [ratio, low, high],
        }
    share = rows[OURS]["tokens_per_second"] * plan.flops_per_token / peak_tflops / 1e12
    found = {"words": work.words, "peak_tflops": peak_tflops, "share_of_peak": share, "rows": rows}
    return found | {"goals": goals(work, rows, share)}


def is_learning(gradient_norm: float) -> bool:
    return 0 < gradient_norm < inf


def cut(*curves: list[float]) -> list[list[float]]:
    """As many first values of each as the shortest has."""
    return [curve[: min(map(len, curves))] for curve in curves]


def ratio_of(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """The median over blocks of how much longer they take, and its bootstrap interval of 95 %."""
    ratios = np.divide(*cut(theirs, ours))
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def goals(work: Work, rows: dict[str, Any], share: float) -> list[dict[str, Any]]:
    """Each goal, and what was attained."""
    times = {name: row["times_as_long_as_ours"][0] for name, row in rows.items() if row["counts"]}
    peers = [ratio for name, ratio in times.items() if name in PEERS]
    ours = [times[name] for name in (OURS, COMPILED) if name in times]
    times["best peer"] = min(peers, default=float("nan")) / min(ours)  # each at its fastest
    found = [
        {"goal": f"{ratio:g} x {name}", "wanted": ratio, "attained": times.get(name)}
        for name, ratio in work.goals.items()
    ]
    if work.peak_share is not None:
        found.append({"goal": "share of peak", "wanted": work.peak_share, "attained": share})
    return found


def page(found: dict[str, Any], machine: str) -> str:
    """All works as tables in Markdown."""
    lines = [f"# Training speed: {machine}, {date.today()}", "", "`python -m benchmarks.speed`"]
    for name, work in found.items():
        peak = f"{work['peak_tflops']:.3f} TFLOP/s measured, {work['share_of_peak']:.0%} of it used"
        lines += ["", f"## {name}", "", f"`{' '.join(work['words'])}`; {peak}.", ""]
        lines += ["| | tokens/s | ours is faster by | peak GiB | from the fp32 loop |"]
        lines += ["|---|--:|--:|--:|--:|"]
        for contestant, row in work["rows"].items():
            ratio, low, high = row["times_as_long_as_ours"]
            cells = [f"{row['tokens_per_second']:,.0f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
            cells += [f"{row['peak_gib']:.2f}", f"{row['loss_apart']:.4f}"]
            lines.append(f"| {contestant} | {' | '.join(cells)} |")
        for goal in work["goals"]:
            attained = goal["attained"]
            is_met = attained is not None and attained >= goal["wanted"]
            said = "no peer that counts" if attained is None else f"{attained:.2f}"
            lines += ["", f"- {goal['goal']}: {said}, {'met' if is_met else 'missed'}"]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """A bar of tokens/s for each contestant that counts; ours are blue."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shape = (ceil(len(found) / 2), 2)
    figure, axes = pyplot.subplots(*shape, figsize=(13, 2.6 * shape[0]), layout="constrained")
    for axis, (name, work) in zip(axes.flat, found.items(), strict=False):
        rows = {key: row for key, row in work["rows"].items() if row["counts"]}
        rates = [row["tokens_per_second"] for row in rows.values()]
        colours = ["#1f5fa8" if key.startswith("llmtrain") else "#b9b9b9" for key in rows]
        bars = axis.barh(list(rows), rates, color=colours)
        axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
        axis.set(title=f"{name}, tokens/s", xlim=(0, 1.15 * max(rates)))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
