"""Trackers get what metrics.jsonl has, once and in one run; what befalls them never reaches it."""

import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.folder import RunFolder
from llmtrain.metrics import Lines, read_records
from llmtrain.sender import Rows
from llmtrain.tracker.mlflow import MLflow
from llmtrain.tracker.trackio import Trackio
from llmtrain.tracking import Tracking, send_rest
from tests.conftest import SMALL, Command, wait_until
from tests.synthetic_runs import make_run
from tests.test_compose import call
from tests.test_run import QUICK, is_gone, steps_of


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a test where a tracker is not installed."""
    is_missing = importlib.util.find_spec(package) is None
    line = f"{package} is not here: pip install -c constraints.txt -e '.[{package}]'"
    return pytest.mark.skipif(is_missing, reason=line)


def losses(folder: RunFolder) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_records(folder.metrics) if "loss" in r}


def warnings_of(folder: RunFolder) -> list[str]:
    lines = folder.tracker_log.read_text().splitlines()
    return [line for line in lines if line.startswith("warning: tracker=")]


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_line_that_installs_it(
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    cache: Path,
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)  # as Python notes what cannot be imported
    roots = [f"cache_root={cache}", f"output_root={tmp_path / 'outputs'}"]
    words = [*roots, *SMALL, "hardware=cpux1"]
    assert call([*words, f"tracker={kind}"], monkeypatch) == 2
    line = f"run: pip install -c constraints.txt -e '.[{kind}]'."
    assert f"tracker={kind} needs {kind}, which is not installed; {line}" in capfd.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_rows_that_were_cut_off_and_came_again_are_sent_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path, 0)
    rows = Rows(path)

    def send() -> list[tuple[int, float]]:
        found = rows.unsent()
        for row in found:
            rows.note(row)
        return [(row["step"], row["loss"]) for row in map(json.loads, found)]

    for step in range(1, 6):
        lines.add({"step": step, "loss": 1.0})
    assert send() == [(step, 1.0) for step in range(1, 6)]
    lines.cut_back(3)
    for step in range(4, 9):  # more than there was before, at the next look
        lines.add({"step": step, "loss": 2.0})
    assert send() == [(step, 2.0) for step in range(4, 9)]
    lines.cut_back(7)
    assert send() == []
    assert Rows(path, rows.mark).unsent() == []
    lines.cut_back(5)
    lines.add({"step": 6, "loss": 3.0})
    lines.add({"step": 7, "loss": 3.0})
    assert len(Rows(path, rows.mark).unsent()) == 7  # where it was cut is not known: all
    lines.close()


@needs("mlflow")
def test_a_dead_tracker_never_stops_a_run(command: Command, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    words = [*QUICK, "train.max_steps=20", "hardware=cpux1", "tracker=mlflow"]
    ended = command.run(*words, "tracker.tracking_uri=http://127.0.0.1:9")
    assert ended.returncode == 0, ended.stderr
    assert "warning: tracker=mlflow" in ended.stdout
    folder = RunFolder(command.only_run())
    assert steps_of(folder.path) == list(range(1, 21))
    assert len(warnings_of(folder)) == 1


@needs("mlflow")
@pytest.mark.filterwarnings("ignore")  # of mlflow, about SQLAlchemy
def test_a_tracker_that_hung_is_told_the_rest_later_and_goes_on_in_the_same_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    folder = make_run(tmp_path / "run", num_steps=40, state="stopped", reached=20)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Tracking(MLflow(tracking_uri=address, experiment="mine"), folder, patience_seconds=4):
            pass
    assert "lacks the last of this run; the same command sends it" in capfd.readouterr().out
    tracker = MLflow(tracking_uri=f"sqlite:///{tmp_path}/all.db", experiment="mine")
    for state, reached in (("stopped", 20), ("done", 40), ("done", 40)):
        make_run(tmp_path / "run", num_steps=40, state=state, reached=reached)
        send_rest(tracker, folder)
    client = MlflowClient(tracker.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_name, run.info.status) == (folder.path.name, "FINISHED")
    assert run.data.params["optimizer.kind"] == "muon"
    assert run.data.params["plan.num_steps"] == "40"
    assert "def main(words)" in run.data.tags["sample"]
    for name in ("loss", "eval_loss"):
        sent = client.get_metric_history(run.info.run_id, name)
        rows = [record for record in read_records(folder.metrics) if name in record]
        there = {each.step: each.value for each in sent}
        assert {row["step"]: there[row["step"]] for row in rows} == {
            row["step"]: row[name] for row in rows
        }
    (closing,) = client.get_metric_history(run.info.run_id, "summary/eval_loss")
    assert closing.value == json.loads(folder.summary.read_text())["eval_loss"]


def wandb_runs(folder: RunFolder) -> list[list[dict[str, Any]]]:
    """The history of each start of an offline run, oldest first; all of them have one id."""
    from wandb.proto.wandb_internal_pb2 import Record

    note, found = json.loads(folder.tracker_note.read_text()), []
    for path in sorted(folder.tracker("wandb").glob("wandb/offline-run-*/run-*.wandb")):
        assert path.stem == f"run-{note['wandb']['id']}"
        rows = []
        for data in leveldb_records(path.read_bytes()[7:], first=7):
            record = Record()
            record.ParseFromString(data)
            items = record.history.item
            rows.append({".".join(item.nested_key): json.loads(item.value_json) for item in items})
        found.append([row for row in rows if "step" in row])
    return found


def leveldb_records(data: bytes, first: int) -> Iterator[bytes]:
    """The records of a log in LevelDB\x27s format, whose blocks begin ``first`` bytes earlier."""
    position, parts = 0, b""
    while position + 7 <= len(data):
        left = 2**15 - (position + first) % 2**15
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@needs("wandb")
def test_a_killed_run_is_the_same_run_of_wandb_and_its_newest_folder_is_whole(
    command: Command,
) -> None:
    words = [*QUICK, "hardware=cpux1", "train.max_steps=100000", "train.eval_every=20"]
    words += ["tracker=wandb", "tracker.mode=offline", "tracker.project=mine"]
    started = command.start(*words)
    wait_until(lambda: noted(command).get("records", [0])[0] > 10)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate(timeout=60)
    wait_until(is_gone(command.folder), 60)
    before = noted(command)

    started = command.start(*words)
    wait_until(lambda: noted(command).get("records", [0])[0] > before["records"][0] + 10)
    os.kill(started.pid, signal.SIGINT)
    started.communicate(timeout=60)
    assert started.returncode == 75
    folder = RunFolder(command.only_run())
    _, whole = wandb_runs(folder)  # the first lacks what the kill took
    assert noted(command)["id"] == before["id"]
    there, here = {row["step"]: row["loss"] for row in whole if "loss" in row}, losses(folder)
    assert {step: there[step] for step in here} == here
    assert {row["step"] for row in whole if "eval_loss" in row} >= {20}
    assert any(key.startswith("sample") for row in whole for key in row)
    assert warnings_of(folder) == []


def noted(command: Command) -> dict[str, Any]:
    """What the note of the one run says of W&B."""
    notes = [RunFolder(path).tracker_note for path in command.runs()]
    found: dict[str, Any] = json.loads(notes[0].read_text()) if notes and notes[0].exists() else {}
    return dict(found.get("wandb", {}))


@needs("trackio")
def test_a_resumed_run_is_the_same_run_of_trackio(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    tracker = Trackio(project="mine")
    folder = make_run(tmp_path / "run", num_steps=40, state="stopped", reached=20)
    for _ in range(2):
        with Tracking(tracker, folder, patience_seconds=120):
            pass
        make_run(tmp_path / "run", num_steps=40)
    script = "import json, trackio; runs = list(trackio.Api().runs('mine')); print(len(runs))"
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert asked.stdout.split()[-1] == "1", asked.stderr
