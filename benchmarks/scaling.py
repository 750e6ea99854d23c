"""How speed and memory grow with a model's size, the length, the batch and the number of ranks.

    python -m benchmarks.scaling [STUDY ...] [--steps 6]

Each point is the command that a user types, and the median over the steps that it records after the
first ones. A straight line through the logarithms gives the exponent. Writes
results/<date>-<machine>/scaling.json, .md and .png.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.speed import COMMON, HERE, llama, overrides
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.hardware import cpu_name
from llmtrain.metrics import read_records
from llmtrain.plan import Plan

WARM_UP = 2  # steps that are not measured
TOKENS = 16_384  # of a step, where lengths are compared
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
SIZES = ((128, 4), (256, 6), (384, 8), (512, 10), (768, 12))  # width and layers
BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Study:
    """One thing that grows.

    ``theory`` is the exponent that tokens/s should have; None: that of what a token costs, where
    FLOPs are all that takes time.
    """

    name: str
    axis: str
    theory: float | None
    points: dict[float | None, list[str]]  # its value, or None for the FLOPs of a token -> words
    num_cores: int | None = None  # for each rank


def of_length(model: str, length: int) -> list[str]:
    words = [f"model={model}", f"train.seq_len={length}", f"train.global_batch={TOKENS // length}"]
    longest = {"max_position_embeddings": TOKENS} if model.startswith("llama") else {}
    return [*words, "train.micro_batch=1", *overrides(longest)]


def studies() -> Iterator[Study]:
    batch = ["train.seq_len=512", "train.global_batch=4"]
    sizes = {size: [*llama(*size, 8192), *batch] for size in SIZES}
    yield Study("size", "FLOPs of a token", -1, sizes)
    for model in ("mamba_tiny", "mamba2_tiny", "llama_tiny"):
        points = {length: of_length(model, length) for length in LENGTHS}
        yield Study(f"length of {model}", "tokens of a sequence", None, points)
    model = [*llama(384, 8, 8192), "train.seq_len=512"]
    points = {
        size: [*model, f"train.global_batch={size}", f"train.micro_batch={size}"]
        for size in BATCHES
    }
    yield Study("batch", "sequences at once", 0, points)
    points = {
        ranks: [*model, "train.global_batch=8", "train.micro_batch=2", f"hardware=cpux{ranks}"]
        for ranks in (1, 2)
    }
    yield Study("ranks", "processes of one core", 1, points, num_cores=1)


def main() -> None:
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("studies", nargs="*", metavar="STUDY")
    parser.add_argument("--steps", type=int, default=6, help="that are measured, of each point")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    stored = options.out / f"{date.today()}-{platform.machine()}" / "scaling.json"
    found = json.loads(stored.read_text())["studies"] if stored.exists() else {}
    for study in studies():
        if not options.studies or study.name in options.studies:
            found[study.name] = measure(study, options.steps)
            write_json(stored, {"machine": cpu_name(), "studies": found})
    print(shown(stored))


def shown(stored: Path) -> str:
    """The table of what was measured, beside it as a page and a picture."""
    measured = json.loads(stored.read_text())
    text = page(measured["studies"], measured["machine"], stored.parent.name[:10])
    write_text(stored.with_suffix(".md"), text)
    draw(measured["studies"], stored.with_suffix(".png"))
    return text


def measure(study: Study, num_steps: int) -> dict[str, Any]:
    """All points of a study, and the exponents of speed and memory."""
    points = []
    for value, words in study.points.items():
        with tempfile.TemporaryDirectory() as scratch:
            points.append(point(value, words, Path(scratch), num_steps, study.num_cores))
        print(f"{study.name}: {json.dumps(points[-1])}", flush=True)
    of = {key: [each[key] for each in points] for key in points[0]}
    theory = study.theory
    if theory is None:
        theory = -exponent(of["value"], of["flops_per_token"])
    found = {"axis": study.axis, "theory": theory, "points": points}
    for quantity in ("tokens_per_second", "memory_gib"):
        found[f"exponent_of_{quantity}"] = exponent(of["value"], of[quantity])
    return found


def exponent(values: list[float], results: list[float]) -> float:
    """The slope of a least-squares line through the logarithms."""
    return float(np.polyfit(np.log(values), np.log(results), 1)[0])


def point(
    value: Any, words: list[str], scratch: Path, num_steps: int, num_cores: int | None
) -> dict[str, float]:
    """Train a few steps in a run of their own."""
    words = [*words, *COMMON, f"train.max_steps={WARM_UP + num_steps}", "train.log_every=1"]
    words += ["train.eval_batches=1", f"output_root={scratch}"]
    words += [] if any(word.startswith("hardware=") for word in words) else ["hardware=cpux1"]
    cores = sorted(os.sched_getaffinity(0))
    if num_cores is not None:
        ranks = int(next(word for word in words if word.startswith("hardware="))[-1])
        cores = cores[: ranks * num_cores]
    command = [sys.executable, "-m", "llmtrain.run", *words]
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cores)), *command], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    (path,) = scratch.iterdir()
    records = [r for r in read_records(RunFolder(path).metrics) if "loss" in r][WARM_UP:]
    flops = Plan.load(RunFolder(path).plan).flops_per_token
    rates = [record["tokens_per_second"] for record in records]
    return {
        "value": flops if isinstance(value, tuple) else value,
        "flops_per_token": flops,
        "tokens_per_second": median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "memory_gib": max(record["memory_gib"] for record in records),
    }


def page(found: dict[str, Any], machine: str, day: str) -> str:
    """A table of the exponents, and one of the points."""
    lines = [f"# Scaling: {machine}, {day}", "", "`python -m benchmarks.scaling`", ""]
    lines += ["Speed goes as x to the power of the exponent. At the left the first point.", ""]
    lines += ["| study | x | tokens/s | exponent | in theory | GiB | exponent |"]
    lines += ["|---|---|---|--:|--:|---|--:|"]
    for name, study in found.items():
        points = study["points"]
        values = " ".join(f"{each['value']:,.4g}" for each in points)
        rates = " ".join(f"{each['tokens_per_second']:,.0f}" for each in points)
        memory = " ".join(f"{each['memory_gib']:.2f}" for each in points)
        speed = study["exponent_of_tokens_per_second"]
        cells = [name, f"{study['axis']}: {values}", rates, f"{speed:.2f}"]
        cells += [f"{study['theory']:.2f}", memory, f"{study['exponent_of_memory_gib']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Tokens/s over what grows, on logarithmic axes, with the fitted line and that of theory."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    plain = EngFormatter(sep="", places=0)
    rows = ceil(len(found) / 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(13, 3.6 * rows), layout="constrained")
    for axis, (name, study) in zip(axes.flat, found.items(), strict=False):
        values = np.array([each["value"] for each in study["points"]])
        rates = np.array([each["tokens_per_second"] for each in study["points"]])
        middle = np.exp(np.log(values).mean())
        through = np.exp(np.log(rates).mean())
        fitted = study["exponent_of_tokens_per_second"]
        axis.loglog(values, rates, "o", color="#1f5fa8")
        for power, style, label in ((fitted, "-", "fitted"), (study["theory"], ":", "theory")):
            line = through * (values / middle) ** power
            axis.loglog(values, line, style, color="#888888", label=f"{label}: {power:.2f}")
        axis.set(title=name, xlabel=study["axis"], ylabel="tokens/s")
        # At least two decades, so that what hardly changes looks so.
        span = max(10.0, (rates.max() / rates.min()) ** 0.5)
        axis.set_ylim(through / span, through * span)
        axis.set_xticks(values, [plain(value) for value in values])
        axis.yaxis.set_major_formatter(plain)
        axis.minorticks_off()
        axis.legend()
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
