"""Sends a run's records to its tracker: `python -m llmtrain.sender RUN TRACKER`, as a process.

Training never waits for a tracker, so this follows the run folder from outside. TRACKER are the
tracker's settings as JSON. Standard input says how the run ended.
"""

import json
import os
import select
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

from omegaconf import OmegaConf

from llmtrain.errors import DONE, FAILED
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.ranks import die_with_parent
from llmtrain.schema import part_of_values
from llmtrain.tracker.base import Line, Subject, Tracker

LOOK_SECONDS = 1.0
RETRY_SECONDS = 60.0
MOST_AT_ONCE = 100  # records, between two notes of how many were sent


class Rows:
    """The rows of a file of JSON lines that were not sent yet.

    The file grows, and is cut back and grows anew where the run goes back to a checkpoint.
    """

    def __init__(self, path: Path, mark: tuple[int, int] = (0, 0)) -> None:
        self.path = path
        self.sent: list[int] = []  # a checksum of each row
        self.end = 0  # of the last of them, in bytes
        self.last = b""
        num_sent, last = mark
        rows = self.unsent()[:num_sent]
        if len(rows) == num_sent and rows and crc32(rows[-1]) == last:  # else it was cut back since
            for row in rows:
                self.note(row)

    @property
    def mark(self) -> tuple[int, int]:
        """How many rows were sent, and a checksum of the last."""
        return len(self.sent), crc32(self.last)

    def unsent(self) -> list[bytes]:
        """Whole rows that follow the last one sent."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.end - len(self.last))
            if file.read(len(self.last)) != self.last:
                self.go_back(file)
            file.seek(self.end)
            return [line for line in file if line.endswith(b"\n")]

    def go_back(self, file: Any) -> None:
        """Keep of what was sent the rows that still stand."""
        before, self.sent, self.end, self.last = self.sent, [], 0, b""
        file.seek(0)
        for line, known in zip(file, before, strict=False):
            if crc32(line) != known:
                return
            self.note(line)

    def note(self, line: bytes) -> None:
        """A row was sent."""
        self.sent.append(crc32(line))
        self.end, self.last = self.end + len(line), line


class Sender:
    """Hands what is new in a run folder to its tracker, and notes in the folder what was sent.

    The note has for each kind of tracker the run's ``id`` there, and of the records and samples the
    :attr:`Rows.mark`.
    """

    def __init__(self, folder: RunFolder, tracker: Tracker) -> None:
        self.folder = folder
        self.tracker = tracker
        self.line: Line | None = None
        self.note = read_note(folder)
        self.told = self.note.setdefault(tracker.kind, {})
        known = self.told if tracker.remembers else {}
        self.records = Rows(folder.metrics, known.get("records", (0, 0)))
        self.samples = Rows(folder.samples, known.get("samples", (0, 0)))
        self.rests_until = 0.0

    def try_to_send(self) -> None:
        """Send what is new; after a failure, which is told once, not for a while."""
        if time.monotonic() < self.rests_until:
            return
        try:
            self.send()
            self.folder.tracker_warning.unlink(missing_ok=True)
        except Exception as error:  # of any kind, and no reason to stop training
            self.rests_until = time.monotonic() + RETRY_SECONDS
            self.warn(error)

    def send(self) -> None:
        """Send what is new. Raises whatever the tracker's package raises."""
        records, samples = self.records.unsent(), self.samples.unsent()
        if self.line is None:
            self.line = self.tracker.open(self.subject())
            self.told["id"] = self.line.id
            self.write_note()
        for first in range(0, len(records), MOST_AT_ONCE):
            some = records[first : first + MOST_AT_ONCE]
            self.line.log([json.loads(row) for row in some])
            for row in some:
                self.records.note(row)
            self.write_note()
        for row in samples:
            sample = json.loads(row)
            self.line.sample(sample["step"], sample["prompt"] + sample["text"])
            self.samples.note(row)
        if samples:
            self.write_note()

    def close(self, state: str) -> int:
        """Send the rest and how the run ended; the exit code says whether all was taken."""
        try:
            self.send()
            assert self.line is not None
            summary = self.folder.summary
            figures = json.loads(summary.read_text()) if state == "done" else {}
            self.line.close(state, figures)
            self.told["state"] = state
            self.write_note()
        except Exception as error:
            self.warn(error)
            return FAILED
        return DONE

    def subject(self) -> Subject:
        """What the tracker has to know before the first record."""
        own = self.folder.tracker(self.tracker.kind)
        own.mkdir(parents=True, exist_ok=True)
        config: Any = OmegaConf.to_container(OmegaConf.load(self.folder.config))
        plan = json.loads(self.folder.plan.read_text())
        return Subject(self.folder.path.name, own, config, plan, self.told.get("id"))

    def warn(self, error: Exception) -> None:
        """One line, in the log of the tracker and for the terminal."""
        said = " ".join(str(error).split()) or repr(error)
        warning = f"tracker={self.tracker.kind} takes no records: {said}"
        if not self.folder.tracker_warning.exists():
            print(f"warning: {warning}", flush=True)
            with suppress(OSError):  # perhaps the disk is full
                write_text(self.folder.tracker_warning, warning)

    def write_note(self) -> None:
        self.told |= {"records": self.records.mark, "samples": self.samples.mark}
        write_json(self.folder.tracker_note, self.note)


def read_note(folder: RunFolder) -> dict[str, Any]:
    """What was sent so far, to whom."""
    path = folder.tracker_note
    return json.loads(path.read_text()) if path.exists() else {}


def main(path: str, settings: str) -> int:
    """Send until the run has ended, or the process that started this one."""
    die_with_parent()
    os.nice(5)  # training goes first
    values = json.loads(settings)
    tracker = part_of_values("tracker", values, "tracker")
    assert isinstance(tracker, Tracker)
    sender = Sender(RunFolder(path), tracker)
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        sender.try_to_send()
    state = sys.stdin.read()
    return sender.close(state) if state else FAILED


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # whatever threads the tracker's package has left
