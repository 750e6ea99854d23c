"""Run folders that look like real ones, as many as one likes, without training anything."""

import copy
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llmtrain.compose import composed
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.metrics import Lines

TOKENS_PER_STEP = 4096
SIZES = (1.2e6, 2.9e6, 5.9e6, 12.1e6, 26.5e6, 50.5e6)
OPTIMIZERS = ("adamw", "lion", "muon")
PROMPT = "def main(words):\n    "


@cache
def base_config() -> str:
    """A composed config, as a run folder has it."""
    return composed(["hardware=cpux1", "name=made_up"]).to_yaml()


def make_run(
    path: Path,
    keys: dict[str, Any] | None = None,
    seed: int = 0,
    state: str = "done",
    num_steps: int = 400,
    reached: int | None = None,
    size: float = SIZES[2],
    text: str | None = None,
    error: str | None = None,
    log_every: int = 2,
) -> RunFolder:
    """A run folder, written as runs write theirs; ``keys`` are dotted keys of its config."""
    folder, random_ = RunFolder(path), random.Random(seed)
    reached = num_steps if reached is None else reached
    keys = keys or {}
    write_text(folder.config, yaml.dump(changed(keys), sort_keys=False))
    write_text(folder.overrides, " ".join(f"{key}={value}" for key, value in keys.items()) + "\n")
    write_json(folder.path / "plan.json", plan(path.name, size, num_steps))
    evaluations = write_records(folder, keys, random_, size, reached, log_every)
    write_samples(
        folder, text or f"return {seed}  # loss {evaluations[-1]['eval_loss']:.2f}", reached
    )
    if state == "done":
        write_json(folder.summary, {**evaluations[-1], "num_steps": num_steps})
    folder.write_status(state, reached, error=error, num_steps=num_steps)
    return folder


def changed(keys: dict[str, Any]) -> dict[str, Any]:
    """The base config with other values."""
    config = copy.deepcopy(yaml.load(base_config(), yaml.CSafeLoader))
    for key, value in keys.items():
        *groups, name = key.split(".")
        part = config
        for group in groups:
            part = part[group]
        part[name] = value
    return dict(config)


def plan(name: str, size: float, num_steps: int) -> dict[str, Any]:
    """What the report reads of a plan."""
    seconds = 0.05 * size / 1e6
    return {
        "name": name,
        "world_size": 1,
        "num_parameters": int(size),
        "flops_per_token": 6.4 * size,
        "vocab_size": 4096,
        "tokens_per_step": TOKENS_PER_STEP,
        "num_steps": num_steps,
        "peak_tflops": 1.5,
        "memory": {"device_peak_gib": 0.3 + size / 2e7},
        "step_seconds": seconds,
        "total_hours": seconds * num_steps / 3600,
        "gpu_hours": seconds * num_steps / 3600,
        "money": 2.5 * seconds * num_steps / 3600,
    }


def write_records(
    folder: RunFolder,
    keys: dict[str, Any],
    random_: random.Random,
    size: float,
    reached: int,
    log_every: int,
) -> list[dict[str, Any]]:
    """Losses that fall as those of language models do, more slowly at a rate that is wrong."""
    lines, evaluations, elapsed = Lines(folder.metrics, 0), [], 0.0
    seconds = 0.05 * size / 1e6 * random_.uniform(0.85, 1.4)
    for step in range(log_every, reached + 1, log_every):
        elapsed += log_every * seconds * random_.uniform(0.97, 1.03)
        loss = loss_at(step, keys, size)
        lines.add(record(step, loss + random_.gauss(0, 0.05), elapsed, seconds, size))
        if step % (25 * log_every) == 0 or step + log_every > reached:
            evaluations.append(evaluation(step, loss + 0.05 + random_.gauss(0, 0.01)))
            lines.add(evaluations[-1])
    lines.close()
    return evaluations


def loss_at(step: int, keys: dict[str, Any], size: float) -> float:
    rate = math.log10(keys.get("optimizer.lr", 1e-3) / 2e-3)
    kind = {"adamw": 0.0, "lion": 0.15, "muon": -0.1}[keys.get("optimizer.kind", "adamw")]
    slow = 1 + 0.5 * rate**2
    compute = 6.4 * size * step * TOKENS_PER_STEP
    return 1.5 + 5.5 * math.exp(-step / (40 * slow)) + 300 * compute**-0.16 + 0.12 * rate**2 + kind


def record(step: int, loss: float, elapsed: float, seconds: float, size: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": step * TOKENS_PER_STEP,
        "tokens_per_second": TOKENS_PER_STEP / seconds,
        "mfu": 0.3,
        "memory_gib": (0.3 + size / 2e7) * 1.08,
        "step_seconds": seconds,
        "elapsed_seconds": elapsed,
    }


def evaluation(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
        "eval_bits_per_byte": loss / math.log(2) / 3.2,
    }


def write_samples(folder: RunFolder, text: str, reached: int) -> None:
    lines = Lines(folder.samples, -1)
    for step, written in (
        (0, "qx ,,of retu(("),
        (reached // 2, "return return x"),
        (reached, text),
    ):
        lines.add({"step": step, "prompt": PROMPT, "text": written})
    lines.close()


def make_sweep(root: Path, num_runs: int, name: str = "lr_and_size", num_steps: int = 400) -> Path:
    """A sweep's folder beside the folders of its runs, some of them pruned, failed or refused."""
    random_ = random.Random(num_runs)
    trials = [make_trial(root, number, random_, num_steps) for number in range(num_runs)]
    sweep = {
        "name": name,
        "words": ["-m", f"sweep={name}"],
        "objectives": {"eval_loss": "minimize"},
        "trials": trials,
    }
    write_json(root / name / "sweep.json", sweep)
    return root / name


def make_trial(root: Path, number: int, random_: random.Random, num_steps: int) -> dict[str, Any]:
    """A trial as a sweep keeps it, and its run's folder."""
    size = SIZES[number % len(SIZES)]
    params = {
        "optimizer.lr": float(f"{10 ** random_.uniform(-4, -1.5):.3g}"),
        "optimizer.kind": random_.choice(OPTIMIZERS),
        "model.config.hidden_size": 64 * (1 + number % len(SIZES)),
    }
    trial = {"number": number, "params": params, "values": None, "error": None}
    if number % 23 == 9:
        said = "train.micro_batch=64 does not fit: 18.2 GiB of 16.0; lower it."
        return trial | {"folder": None, "state": "refused", "error": said}
    state = "failed" if number % 29 == 11 else "pruned" if number % 4 == 3 else "done"
    error = "Rank 0 was killed (signal 9); see logs/rank_0.log" if state == "failed" else None
    folder = make_run(
        root / f"made_up-{number:08x}",
        params,
        number,
        "stopped" if state == "pruned" else state,
        num_steps=num_steps,
        reached=num_steps if state == "done" else num_steps * (2 + number % 3) // 8,
        size=size,
        error=error,
    )
    value = None if state != "done" else RunFolder(folder.path).summary
    values = [yaml.safe_load(value.read_text())["eval_loss"]] if value else None
    return trial | {
        "folder": f"../{folder.path.name}",
        "state": state,
        "values": values,
        "error": error,
    }
