"""A run's records: metrics.jsonl and TensorBoard, written by the first rank alone."""

import json
import math
import os
from pathlib import Path
from typing import Any

from llmtrain.folder import RunFolder, finite, write_text


class Metrics:
    """Appends records to metrics.jsonl and draws the same in TensorBoard.

    On resume, records after ``step`` are cut off, so that every step stands in the file once.
    """

    def __init__(self, folder: RunFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        cut_back(folder.metrics, step)
        cut_back(folder.samples, step if step else -1)
        self.folder = folder
        self.file = open(folder.metrics, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)
        self.board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else 0)

    def record(self, values: dict[str, Any]) -> None:
        """One record; ``values`` has a ``step`` and numbers by name. A NaN is written as null."""
        plain = {name: finite(value) for name, value in values.items()}
        self.file.write(json.dumps(plain) + "\n")
        self.file.flush()
        for name, value in values.items():
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if name != "step" and is_number:
                self.board.add_scalar(name, value, values["step"])

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A text that the model wrote at a step."""
        with open(self.folder.samples, "a", encoding="utf-8") as file:
            row = {"step": step, "prompt": prompt, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.board.add_text("sample", f"```\n{prompt}{text}\n```", step)

    def hparams(self, values: dict[str, Any], results: dict[str, float]) -> None:
        """The run as one row of TensorBoard's HPARAMS tab."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, int | float | bool | str) else str(value)
            for name, value in values.items()
        }
        for summary in hparams(plain, results):
            self.board._get_file_writer().add_summary(summary)
        for name, value in results.items():
            self.board.add_scalar(name, value)

    def sync(self) -> None:
        """Put what was recorded on disk: a checkpoint that follows vouches for it."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def cut_back(path: Path, step: int) -> None:
    """Keep the records up to ``step``."""
    records = read_records(path)
    kept = [record for record in records if record["step"] <= step]
    if path.exists():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
        write_text(path, "".join(lines))
