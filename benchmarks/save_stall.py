"""How long training stops for a checkpoint: one that is written behind it, one that it waits for.

    python -m benchmarks.save_stall [--model llama_125m] [--sizes 4x1024]

One run, one rank: steps, a save, steps, a save, and so on, the two ways in turn. Both begin and end
at the same point of a step. Writes results/<date>-<machine>/save_stall.json and .md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from llmtrain.errors import DONE
from llmtrain.folder import RunFolder, write_json, write_text

HERE = Path(__file__).parent
ROUNDS = 5


def measure(folder: RunFolder, ranks: Any) -> None:
    """In place of :func:`llmtrain.train.train`: what saves cost, in seconds."""
    from llmtrain import saving, starting

    run = starting.start(folder, ranks)
    run.engine.module.train()
    found: dict[str, list[float]] = {"behind": [], "waited": [], "step": [], "step_behind": []}
    for _ in range(3):
        one_step(run)
    for number in range(2 * ROUNDS):
        is_behind = number % 2 == 0
        run.plan = replace(run.plan, saves_behind=is_behind)
        run.saver.is_asynchronous = is_behind
        found["behind" if is_behind else "waited"].append(seconds(saving.save_checkpoint, run))
        while run.saver.part is not None:  # written beside these
            found["step_behind"].append(seconds(one_step, run))
        run.saver.settle()
        found["step"] += [seconds(one_step, run) for _ in range(3)]
    assert run.saver.problem is None
    write_json(folder.path / "stall.json", found)


def one_step(run: Any) -> None:
    from llmtrain.step import train_step

    train_step(run)
    run.step += 1
    run.saver.poll()


def seconds(call: Any, run: Any) -> float:
    start = time.perf_counter()
    call(run)
    return time.perf_counter() - start


def rank(path: str) -> None:
    """What a rank process runs."""
    from llmtrain import train

    with patch.object(train, "train", measure):
        train.main(path)


def main() -> int:
    assert __doc__ is not None
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("--model", default="llama_125m")
    parser.add_argument("--sizes", default="4x1024", help="sequences x tokens of a step")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rank)
    report(options, in_a_rank(options))
    return DONE


def in_a_rank(options: argparse.Namespace) -> dict[str, list[float]]:
    """The run, in a process that starts as those of any run."""
    from launchers.local import shared_environment
    from llmtrain.compose import composed
    from llmtrain.data.shards import prepare
    from llmtrain.hardware import num_cores
    from llmtrain.job import Job
    from llmtrain.plan import make_plan
    from llmtrain.training import library_settings

    batch, length = options.sizes.split("x")
    words = [
        f"model={options.model}",
        "hardware=cpux1",
        f"train.global_batch={batch}",
        f"train.seq_len={length}",
        "data.tokenizer.vocab_size=16384",
        "train.max_steps=100000",
        f"name=stall_{time.time_ns()}",
        f"output_root={Path('outputs/save_stall').absolute()}",
    ]
    config = composed(words)
    manifest = prepare(config.data, config.cache, config.tokenizer_path, progress=False)
    job = Job(config, make_plan(config, manifest), manifest)
    job.fill_folder()
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    shared = shared_environment(num_cores()) | places | library_settings(config, "cpu")
    command = [sys.executable, "-m", "benchmarks.save_stall", "--rank", str(job.folder.path)]
    subprocess.run(command, env=os.environ | shared, check=True)
    return json.loads((job.folder.path / "stall.json").read_text())  # type: ignore[no-any-return]


def report(options: argparse.Namespace, found: dict[str, list[float]]) -> None:
    """Print and keep the medians."""
    from llmtrain.hardware import cpu_name

    step = median(found["step"])
    rows = {
        "a step": step,
        "a step while a checkpoint is written": median(found["step_behind"]),
        "training stops, written behind it": median(found["behind"]),
        "training stops, waiting for it": median(found["waited"]),
    }
    place = options.out / f"{date.today()}-{platform.machine()}" / "save_stall"
    lines = [
        "# What a checkpoint costs",
        "",
        f"`python -m benchmarks.save_stall --model {options.model} --sizes {options.sizes}` of "
        f"{date.today()} on {cpu_name()}; medians of {ROUNDS} saves each way.",
        "",
        "| | seconds | of a step |",
        "| --- | --: | --: |",
        *(f"| {name} | {value:.3f} | {value / step:.1%} |" for name, value in rows.items()),
    ]
    print("\n".join(lines))
    write_json(place.with_suffix(".json"), {"options": vars(options) | {"out": None}, **found})
    write_text(place.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
