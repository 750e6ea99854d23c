"""Ten steps of a tiny Llama on every rank, through the command that trains everything."""

import math
import tempfile
from pathlib import Path
from typing import Any

from llmtrain.doctor.ask import NoAnswer, reason, run
from llmtrain.doctor.line import Line, green, red
from llmtrain.folder import RunFolder
from llmtrain.metrics import read_records

MOST_SECONDS = 420  # the first run of a machine trains a tokenizer and compiles
NUM_STEPS = 10
LEAST_BATCH = 16


def words(num_ranks: int, folder: str) -> list[str]:
    """The overrides: a batch that divides among the ranks, and no more evaluation than must be."""
    batch = math.ceil(LEAST_BATCH / num_ranks) * num_ranks
    return [
        "model=llama_tiny",
        "hardware=auto",
        f"train.max_steps={NUM_STEPS}",
        f"train.global_batch={batch}",
        "train.log_every=1",
        f"train.eval_every={NUM_STEPS}",
        "train.eval_batches=1",
        f"checkpoint.every={NUM_STEPS}",
        f"output_root={folder}",
    ]


def train(num_ranks: int) -> Line:
    """Train, and read what the run left."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = run("llmtrain.run", *words(num_ranks, folder), seconds=MOST_SECONDS)
        except NoAnswer as problem:
            return failure(str(problem))
        if ended.returncode != 0:
            return failure(reason(ended.returncode, ended.stderr))
        records = read_records(RunFolder(next(Path(folder).iterdir())).metrics)
        return training([record for record in records if "loss" in record], num_ranks)


def failure(problem: str) -> Line:
    remedy = "mend what is red or yellow above; then: python -m llmtrain.run train.max_steps=10"
    return red("training", found=f"llama_tiny does not train: {problem}", remedy=remedy)


def training(records: list[dict[str, Any]], num_ranks: int) -> Line:
    """Loss from first to last, and the pace of the later half, when all is warm."""
    losses = [record["loss"] for record in records]
    what = f"llama_tiny, {len(losses)} steps on {num_ranks} rank{'s' if num_ranks > 1 else ''}: "
    what += f"loss {losses[0]:.2f} to {losses[-1]:.2f}"
    if not losses[-1] < losses[0]:
        remedy = "the same command on the CPU should learn: CUDA_VISIBLE_DEVICES= "
        remedy += "python -m llmtrain.run train.max_steps=10; if it does, suspect the devices"
        return red("training", found=f"{what}, which is no learning", remedy=remedy)
    later = [record["tokens_per_second"] for record in records[len(records) // 2 :]]
    return green("training", found=f"{what}, {sum(later) / len(later):,.0f} tok/s")
