"""A run's records: metrics.jsonl and TensorBoard, written by the first rank alone."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import TrainingError, is_disk_full
from llmtrain.folder import RunFolder, finite, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Lines:
    """Appends rows to a file of JSON lines; those that a full disk refuses wait until it has room.

    On resume, rows after ``step`` are cut off, so that every step stands in the file once.
    """

    def __init__(self, path: Path, step: int) -> None:
        cut_back(path, step)
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed in close)
        self.waiting = b""

    def add(self, row: dict[str, Any]) -> None:
        self.waiting += json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self.write()

    def write(self) -> bool:
        """Write what waits; whether nothing waits any more."""
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not is_disk_full(error):
                raise
        return not self.waiting

    def sync(self) -> bool:
        """Whether all that was added is on the disk now."""
        if self.write():
            os.fsync(self.file.fileno())
        return not self.waiting

    def close(self) -> None:
        """Raises TrainingError where rows would be lost."""
        if not self.write():
            path = self.file.name
            raise TrainingError(f"The disk is full: {path} lacks its last records. Free some.")
        self.file.close()


class Board:
    """The records as TensorBoard's curves; what a full disk refuses is drawn again afterwards."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self.folder = folder
        self.drawn_step = step  # up to here all is on the disk
        self.writer = writer_of(folder, step)
        self.is_broken = False

    def draw(self, draw: Callable[["SummaryWriter"], None]) -> None:
        try:
            if self.is_broken:
                self.begin_again()
            draw(self.writer)
        except OSError as error:  # perhaps of an earlier call: a thread writes
            if not is_disk_full(error):
                raise
            self.is_broken = True

    def begin_again(self) -> None:
        """A new file that replaces the curves from the last step that is surely drawn."""
        self.writer = writer_of(self.folder, self.drawn_step)
        for record in read_records(self.folder.metrics):
            if record["step"] > self.drawn_step:
                draw_numbers(self.writer, record)
        self.is_broken = False

    def sync(self, step: int) -> None:
        self.draw(lambda writer: writer.flush())
        if not self.is_broken:
            self.drawn_step = step

    def close(self) -> None:
        self.draw(lambda writer: writer.close())


def writer_of(folder: RunFolder, step: int) -> "SummaryWriter":
    """A file of TensorBoard's that goes on after a step."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.tensorboard), purge_step=step + 1 if step else 0)


def draw_numbers(writer: "SummaryWriter", values: dict[str, Any]) -> None:
    for name, value in values.items():
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if name != "step" and is_number:
            writer.add_scalar(name, value, values["step"])


class Metrics:
    """Appends records to metrics.jsonl and draws the same in TensorBoard."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self.records = Lines(folder.metrics, step)
        self.samples = Lines(folder.samples, step if step else -1)
        self.board = Board(folder, step)

    def record(self, values: dict[str, Any]) -> None:
        """One record; ``values`` has a ``step`` and numbers by name. A NaN is written as null."""
        self.records.add({name: finite(value) for name, value in values.items()})
        self.board.draw(lambda writer: draw_numbers(writer, values))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A text that the model wrote at a step."""
        self.samples.add({"step": step, "prompt": prompt, "text": text})
        shown = f"```\n{prompt}{text}\n```"
        self.board.draw(lambda writer: writer.add_text("sample", shown, step))

    def hparams(self, values: dict[str, Any], results: dict[str, float]) -> None:
        """The run as one row of TensorBoard's HPARAMS tab."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, int | float | bool | str) else str(value)
            for name, value in values.items()
        }

        def draw(writer: "SummaryWriter") -> None:
            for summary in hparams(plain, results):
                writer._get_file_writer().add_summary(summary)
            for name, value in results.items():
                writer.add_scalar(name, value)

        self.board.draw(draw)

    def sync(self, step: int) -> bool:
        """Put what was recorded on disk: a checkpoint that follows vouches for it.

        Returns whether it is there; on a full disk it is not.
        """
        self.board.sync(step)
        return self.records.sync() and self.samples.sync()

    def close(self) -> None:
        self.records.close()
        self.samples.close()
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
