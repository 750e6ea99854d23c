"""A disk without room stops no run and loses no record."""

import errno
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from llmtrain.artefacts import partial_folder
from llmtrain.folder import RunFolder
from llmtrain.metrics import Lines, Metrics, cut_back, read_records
from tests.conftest import SMALL, Command, wait_until
from tests.test_run import steps_of

RECORD = {"loss": 2.5, "words": "x" * 100}


def fill(disk: Path) -> Path:
    """Take all room; deleting the file gives it back."""
    filler = disk / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def steps_in(path: Path) -> list[int]:
    """The steps in a file of rows, each of which has to be whole."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_wait_until_there_is_room(small_disk: Path) -> None:
    lines = Lines(small_disk / "rows.jsonl", 0)
    for step in range(1, 11):
        lines.add({"step": step, **RECORD})
    assert lines.sync()
    filler = fill(small_disk)
    for step in range(11, 101):
        lines.add({"step": step, **RECORD})
    assert not lines.sync()
    there = steps_in(small_disk / "rows.jsonl")
    assert there == list(range(1, len(there) + 1))
    assert len(there) < 100
    filler.unlink()
    lines.close()
    assert steps_in(small_disk / "rows.jsonl") == list(range(1, 101))


def test_what_waits_is_cut_back_with_the_file(small_disk: Path) -> None:
    lines = Lines(small_disk / "rows.jsonl", 0)
    lines.add({"step": 1, **RECORD})
    filler = fill(small_disk)
    for step in range(2, 101):
        lines.add({"step": step, **RECORD})
    lines.cut_back(90)
    lines.add({"step": 91, "again": True})
    filler.unlink()
    lines.close()
    assert steps_in(small_disk / "rows.jsonl") == list(range(1, 92))
    assert '"again"' in (small_disk / "rows.jsonl").read_text().splitlines()[-1]


def test_the_curves_are_drawn_again_when_there_is_room(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("llmtrain.metrics.SECONDS_BETWEEN_TRIES", 0.0)
    folder = RunFolder(small_disk / "run")
    folder.path.mkdir()
    metrics = Metrics(folder, 0)
    metrics.record({"step": 1, "loss": 1.0})
    assert metrics.sync(1)
    filler = fill(small_disk)
    for step in range(2, 30):
        metrics.record({"step": step, "loss": float(step)})
        metrics.sync(step)
    filler.unlink()
    for step in range(30, 33):
        metrics.record({"step": step, "loss": float(step)})
        metrics.sync(step)
    metrics.close()
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 33))


def test_a_text_may_have_any_line_end(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "samples.jsonl", -1)
    for step in (0, 5, 10):
        lines.add({"step": step, "text": "one\u2028two\u0085three\n"})
    lines.close()
    cut_back(tmp_path / "samples.jsonl", 5)
    assert [row["step"] for row in read_records(tmp_path / "samples.jsonl")] == [0, 5]


def test_a_model_that_does_not_fit_the_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with (
        pytest.raises(OSError, match="No space left on device") as raised,
        partial_folder(tmp_path / "best") as partial,
    ):
        (partial / "config.json").touch()
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_over_a_full_disk_and_can_be_stopped_there(
    command: Command, large_disk: Path
) -> None:
    words = [*SMALL, "train.log_every=1", "train.eval_every=50", "train.eval_batches=1"]
    words += [
        "hardware=cpux1",
        "checkpoint.every=20",
        "train.max_steps=1500",
        f"output_root={large_disk}",
    ]
    started = command.start(*words)
    wait_until(lambda: bool(list(large_disk.glob("*/checkpoints/step_20"))))
    (run,) = large_disk.iterdir()
    filler = fill(large_disk)
    time.sleep(1)
    os.kill(started.pid, signal.SIGTERM)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 75, said
    assert "Traceback" not in said
    assert RunFolder(run).checkpoint_steps()
    filler.unlink()
    assert command.run(*words).returncode == 0
    assert steps_of(run) == list(range(1, 1501))
