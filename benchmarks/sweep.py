"""A search beside a random one of as many trials, killed half-way; and what a trial costs in it.

    python -m benchmarks.sweep [--seeds 5] [--trials 24]

The space is optimizer, learning rate and schedule of llama_tiny, 40 steps a trial, two at a time.
The first search is killed at half of its trials and started again. Before them points are run by
commands of their own and as a grid, and what each takes until its ranks are ready and after they
are done is compared. Writes results/<date>-<machine>/sweep.json and .md.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from llmtrain.errors import DONE
from llmtrain.folder import write_json, write_text
from llmtrain.hardware import cpu_name

HERE = Path(__file__).parent
OUTPUTS = Path("outputs/sweep_benchmark")
RUN = ["model=llama_tiny", "train.max_steps=40", "train.seq_len=64", "train.global_batch=4"]
RUN += ["train.eval_every=4", "train.eval_batches=8", "hardware=cpux1", "zero.stage=0"]
SPACE = ["optimizer=adamw,muon", "optimizer.lr=tag(log,interval(1e-6,1))"]
SPACE += ["schedule=cosine,linear,constant"]
POINTS = (1, 2, 3, 4, 5)


def main() -> int:
    assert __doc__ is not None
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    shutil.rmtree(OUTPUTS, ignore_errors=True)
    beside = overheads()
    rows = [
        searched(sampler, seed, options.trials)
        for seed in range(options.seeds)
        for sampler in ("tpe", "random")
    ]
    report(options.out, rows, beside)
    return DONE


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "llmtrain.run", *words]


def searched(sampler: str, seed: int, num_trials: int) -> dict[str, Any]:
    """One search of its own outputs, so that none finds another's runs done."""
    root = OUTPUTS / f"{sampler}_{seed}"
    how = [f"sweep.sampler={sampler}", f"sweep.seed={seed}", f"sweep.num_trials={num_trials}"]
    prunes = ["sweep.pruner=halving", "sweep.pruner_options.min_resource=12"]
    prunes += ["sweep.pruner_options.reduction_factor=2"]
    how += ["sweep.pruner=none"] if sampler == "random" else prunes
    words = command("-m", "sweep=search", *RUN, *SPACE, *how, "sweep.num_parallel=2")
    words.append(f"output_root={root}")
    was_killed = sampler == "tpe" and seed == 0
    begun = time.monotonic()
    if was_killed:
        kill_half_way(words, root, num_trials // 2)
    subprocess.run(words, check=False)
    trials = record_of(root)["trials"]
    best = min(trial["values"][0] for trial in trials if trial["values"])
    states = [trial["state"] for trial in trials]
    row = {"sampler": sampler, "seed": seed, "was_killed": was_killed, "best": best}
    row |= {"trials": len(trials), "seconds": time.monotonic() - begun}
    row |= {state: states.count(state) for state in ("done", "pruned", "failed")}
    print(row, flush=True)
    return row


def kill_half_way(words: list[str], root: Path, num_trials: int) -> None:
    """Start a search and kill it when so many of its trials are over."""
    started = subprocess.Popen(words)
    while num_over(root) < num_trials:
        time.sleep(0.2)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()


def num_over(root: Path) -> int:
    if not list(root.glob("*/sweep.json")):
        return 0
    return sum(trial["state"] in ("done", "pruned") for trial in record_of(root)["trials"])


def record_of(root: Path) -> dict[str, Any]:
    (path,) = root.glob("*/sweep.json")
    return dict(json.loads(path.read_text()))


def overheads() -> dict[str, float]:
    """Seconds a run takes beside what its ranks do: by its own command, and as one of a grid."""
    own = [timed(f"seed={seed}", f"output_root={OUTPUTS}/own") for seed in POINTS]
    seeds = ",".join(map(str, POINTS))
    grid = timed("-m", f"seed={seeds}", f"output_root={OUTPUTS}/grid")
    one = timed("-m", f"seed=choice({POINTS[0]})", f"output_root={OUTPUTS}/one")
    worked = {name: worked_seconds(OUTPUTS / name) for name in ("own", "grid")}
    more = (grid - one) / (len(POINTS) - 1) - median(worked["grid"])
    return {
        "a command of its own": median(own) - median(worked["own"]),
        "one more point of a grid": more,
        "of these, from the start of its ranks until they are ready": median(
            started_seconds(OUTPUTS / "grid")
        ),
    }


def timed(*words: str) -> float:
    begun = time.monotonic()
    subprocess.run(command(*words, *RUN), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def worked_seconds(root: Path) -> list[float]:
    """From ready ranks to the end of each run: steps, evaluations, samples, the final model."""
    return [between(run, "environment.json", "summary.json") for run in runs_of(root)]


def started_seconds(root: Path) -> list[float]:
    """From a folder filled to ready ranks."""
    return [between(run, "config.yaml", "environment.json") for run in runs_of(root)]


def runs_of(root: Path) -> list[Path]:
    return [path.parent for path in root.glob("*/summary.json")]


def between(run: Path, first: str, second: str) -> float:
    """Seconds from the writing of one file of a run to that of another."""
    return (run / second).stat().st_mtime - (run / first).stat().st_mtime


def report(out: Path, rows: list[dict[str, Any]], beside: dict[str, float]) -> None:
    """Print and keep the table."""
    folder = out / f"{date.today()}-{platform.machine()}"
    write_json(folder / "sweep.json", {"machine": cpu_name(), "rows": rows, "overheads": beside})
    names = list(rows[0])
    lines = [f"# Searches: {cpu_name()}, {date.today()}", "", " | ".join(["", *names, ""]).strip()]
    lines.append("|" + " --- |" * len(names))
    for row in rows:
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    best = {(row["sampler"], row["seed"]): row["best"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    won = sum(best["tpe", seed] < best["random", seed] for seed in seeds)
    lines += ["", f"The search found a lower loss in {won} of {len(seeds)} seeds."]
    lines += [f"- {name}: {value:.2f} s beside training" for name, value in beside.items()]
    text = "\n".join(lines) + "\n"
    write_text(folder / "sweep.md", text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
