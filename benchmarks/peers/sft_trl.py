"""TRL's SFTTrainer on the work of benchmarks/sft_packing.py: `python sft_trl.py JOB.json`.

Run by the interpreter of TRL's own environment, so nothing of ours is imported. The job names the
model, the rows and the settings; the file that it calls ``result`` gets, after each optimizer
step, the time and the tokens trained so far, and the losses that the trainer logged.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

PACKAGES = ("trl", "transformers", "torch", "accelerate")


class Clock(TrainerCallback):
    """Notes when each step ended. A token is trained if one before it in its document was read."""

    def __init__(self) -> None:
        self.tokens = 0
        self.steps: list[dict[str, float]] = []

    def count(self, inputs: dict[str, Any]) -> None:
        mask_BL = inputs.get("attention_mask")
        if mask_BL is None:  # packed: positions restart with each document
            self.tokens += int((inputs["position_ids"] > 0).sum())
        else:
            self.tokens += int(mask_BL.sum()) - len(mask_BL)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append({"seconds": time.perf_counter(), "tokens": self.tokens})


class CountingTrainer(SFTTrainer):
    """The trainer as it is, with each batch shown to the clock first."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(callbacks=[clock], **options)
        self.clock = clock

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        self.clock.count(inputs)
        return super().training_step(model, inputs, *more)


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    trainer = CountingTrainer(
        Clock(),
        model=job["model"],
        args=SFTConfig(**job["settings"]),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    logged = [record for record in trainer.state.log_history if "loss" in record]
    result = {
        "steps": trainer.clock.steps,
        "losses": [[record["step"], record["loss"]] for record in logged],
        "data": size_of(trainer.train_dataset),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    Path(job["result"]).write_text(json.dumps(result))


def size_of(dataset: Dataset) -> dict[str, int]:
    """The tokens of one pass over the prepared data that are trained, and those with a loss."""
    lengths = [row.get("seq_lengths") or [len(row["input_ids"])] for row in dataset]
    return {
        "num_tokens": sum(sum(row) - len(row) for row in lengths),
        "num_learned": sum(label >= 0 for row in dataset for label in row["labels"]),
    }


if __name__ == "__main__":
    main(sys.argv[1])
