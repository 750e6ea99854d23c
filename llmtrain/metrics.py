"""A run's records: metrics.jsonl and TensorBoard, written by the first rank alone."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import TrainingError, is_disk_full
from llmtrain.folder import RunFolder, finite

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


SECONDS_BETWEEN_TRIES = 10.0  # to draw again on a disk that was full


class Lines:
    """Appends rows to a file of JSON lines; those that a full disk refuses wait until it has room.

    The file holds whole rows only. On resume, rows after ``step`` are cut off, so that every step
    stands in it once.
    """

    def __init__(self, path: Path, step: int) -> None:
        cut_back(path, step)
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed in close)
        self.synced_bytes = path.stat().st_size
        self.unsynced = b""
        self.waiting = b""

    def add(self, row: dict[str, Any]) -> None:
        self.waiting += json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self.write()

    def write(self) -> bool:
        """Write what waits; whether nothing waits any more."""
        end, rest = self.synced_bytes + len(self.unsynced), self.waiting
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            if not is_disk_full(error):
                raise
            self.file.truncate(end)
            return False
        self.unsynced, self.waiting = self.unsynced + self.waiting, b""
        return True

    def sync(self) -> bool:
        """Whether all that was added is on the disk now."""
        if not self.write():
            return False
        try:
            os.fsync(self.file.fileno())
        except OSError as error:  # some disks say only now that they are full
            if not is_disk_full(error):
                raise
            self.file.truncate(self.synced_bytes)
            self.unsynced, self.waiting = b"", self.unsynced
            return False
        self.synced_bytes, self.unsynced = self.synced_bytes + len(self.unsynced), b""
        return True

    def cut_back(self, step: int) -> None:
        """Forget what is of later steps."""
        cut_back(Path(self.file.name), step)
        rows = self.waiting.splitlines(keepends=True)
        self.synced_bytes, self.unsynced = Path(self.file.name).stat().st_size, b""
        self.waiting = b"".join(row for row in rows if json.loads(row)["step"] <= step)

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
        self.broke_at = 0.0

    def draw(self, draw: Callable[["SummaryWriter"], None]) -> None:
        """Draw something that is no record; where the disk is full it is left out."""
        if self.is_broken:
            return
        try:
            draw(self.writer)
        except OSError as error:  # perhaps of an earlier call: a thread writes
            self.give_up(error)

    def draw_record(self, values: dict[str, Any]) -> None:
        if not self.is_broken:
            self.draw(lambda writer: draw_numbers(writer, values))
        elif time.monotonic() - self.broke_at > SECONDS_BETWEEN_TRIES:
            self.begin_again()

    def begin_again(self) -> None:
        """A new file that replaces the curves from the last step that is surely drawn."""
        try:
            self.writer = writer_of(self.folder, self.drawn_step)
            for record in read_records(self.folder.metrics):
                if record["step"] > self.drawn_step:
                    draw_numbers(self.writer, record)
            self.is_broken = False
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        if not is_disk_full(error):
            raise error
        self.is_broken, self.broke_at = True, time.monotonic()

    def sync(self, step: int) -> None:
        self.draw(lambda writer: writer.flush())
        if not self.is_broken:
            self.drawn_step = step

    def close(self) -> None:
        if self.is_broken:
            self.begin_again()
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
        self.folder = folder
        self.records = Lines(folder.metrics, step)
        self.samples = Lines(folder.samples, step if step else -1)
        self.board = Board(folder, step)

    def record(self, values: dict[str, Any]) -> dict[str, Any]:
        """One record; ``values`` has a ``step`` and numbers by name. A NaN is written as null."""
        record = {name: finite(value) for name, value in values.items()}
        self.records.add(record)
        self.board.draw_record(values)
        return record

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

    def cut_back(self, step: int) -> None:
        """Go on after an earlier step, as if what followed had never been."""
        self.records.cut_back(step)
        self.samples.cut_back(step)
        self.board.close()
        self.board = Board(self.folder, step)

    def close(self) -> None:
        self.records.close()
        self.samples.close()
        self.board.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # a text may have other line ends
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def cut_back(path: Path, step: int) -> None:
    """Cut off the rows from the first that is of a step after ``step``, or that is torn.

    It is done in place, which a full disk allows.
    """
    if not path.exists():
        return
    end = 0
    with open(path, "rb+") as file:
        for line in file:
            if not is_row_up_to(line, step):
                break
            end += len(line)
        file.truncate(end)


def is_row_up_to(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= step)
    except ValueError:
        return False
