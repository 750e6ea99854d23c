"""All runs below a folder: what each says of itself, and whether that is so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.status import QUIET_SECONDS, main, span
from tests.conftest import ROOT, Command, wait_until
from tests.test_run import LONG, QUICK, has_saved, is_gone


def listed(root: Path, capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The runs below a folder as --json gives them."""
    assert main([str(root), "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capfd.readouterr().out)
    return rows


def test_a_run_is_running_until_it_is_killed_and_then_stale(
    command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    started = command.start(*QUICK, LONG, "hardware=cpux1", "name=alive")
    wait_until(has_saved(command, 10))
    outputs = command.folder / "outputs"
    (row,) = listed(outputs, capfd)
    assert row["name"].startswith("alive-")
    assert row["state"] == "running"
    assert row["num_steps"] == 400
    assert row["last_checkpoint"] >= 10
    assert min(row["loss"], row["tokens_per_second"]) > 0
    assert (row["restarts"], row["skipped_steps"], row["error"]) == (0, 0, None)
    status = RunFolder(command.only_run()).read_status()
    assert {"step", "num_steps", "time", "eta_seconds", "last_checkpoint"} < set(status)
    wait_until(lambda: (listed(outputs, capfd)[0]["eta_seconds"] or 0) > 0)

    os.kill(started.pid, signal.SIGKILL)
    started.communicate(timeout=60)
    wait_until(is_gone(command.folder), 60)
    assert listed(outputs, capfd)[0]["state"] == "stale"


def test_a_run_that_is_quiet_for_long_is_stale_although_its_folder_is_held(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.write_status("running", 7)
        assert listed(tmp_path, capfd)[0]["state"] == "running"
        then = time.time() - 2 * QUIET_SECONDS
        os.utime(run.status, (then, then))
        assert listed(tmp_path, capfd)[0]["state"] == "stale"
        write_text(run.metrics, json.dumps({"loss": 1.0, "step_seconds": QUIET_SECONDS}) + "\n")
        os.utime(run.metrics, (then, then))
        assert listed(tmp_path, capfd)[0]["state"] == "running", "its steps are as long"


def test_runs_are_listed_newest_first_with_what_ended_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for age, (state, more) in enumerate(
        [("done", {"restarts": 2}), ("failed", {"error": "no [memory]"}), ("planned", {})]
    ):
        run = RunFolder(tmp_path / "deeper" / f"{state}-1")
        run.write_status(state, 1234, num_steps=5000, time=time.time() - 3600 * age, **more)
    write_text(run.path.parent / "broken" / "status.json", "{")
    os.utime(run.path.parent / "broken" / "status.json", (1, 1))
    rows = listed(tmp_path, capfd)
    assert [row["state"] for row in rows] == ["done", "failed", "planned", "unreadable"]
    assert [row["error"] for row in rows] == [None, "no [memory]", None, None]
    assert [row["restarts"] for row in rows] == [2, 0, 0, 0]

    assert main([str(tmp_path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "state", "step"]
    assert [line.split()[0] for line in lines[1:]] == ["done-1", "failed-1", "planned-1", "broken"]
    assert "1,234/5,000" in lines[1]
    assert lines[2].rstrip().endswith("1.0 h")


def test_counts_hold_until_somebody_gives_others(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_status("planned", 0, num_steps=9)
    run.write_status("running", 1, skipped_steps=3, eta_seconds=5.0)
    run.write_status("failed", 2, error="why")
    status = run.read_status()
    assert (status["num_steps"], status["skipped_steps"], status["restarts"]) == (9, 3, 0)
    assert (status["eta_seconds"], status["error"]) == (None, "why")


def test_a_run_of_an_older_version_is_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "old")
    write_json(run.status, {"state": "stopped", "step": 20, "error": None})
    write_json(run.path / "plan.json", {"num_steps": 40})
    whole, cut = json.dumps({"step": 20, "loss": 2.5}), '{"step": 30, "lo'
    write_text(run.metrics, f"{whole}\n{cut}")
    run.checkpoint(20).mkdir(parents=True)
    (row,) = listed(tmp_path, capfd)
    found = (row["state"], row["step"], row["num_steps"], row["loss"], row["last_checkpoint"])
    assert found == ("stopped", 20, 40, 2.5, 20)
    assert main([str(run.path)]) == 0, "a run itself is listed, too"
    assert "20/40" in capfd.readouterr().out


def test_a_folder_that_does_not_exist_is_one_line_and_one_without_runs_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    said = capfd.readouterr()
    assert said.err.count("\n") == 1
    assert "nowhere does not exist" in said.err
    assert main([str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"No runs below {tmp_path}.\n"
    assert main([str(tmp_path), "--json"]) == 0
    assert capfd.readouterr().out == "[]\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (90, "2 min"), (5400, "1.5 h"), (2e5, "2.3 d")]
)
def test_a_length_of_time_is_said_in_its_largest_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_who_watches_sees_a_run_end_and_leaves_with_ctrl_c(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_status("planned", 0)
    words = [sys.executable, "-u", "-m", "llmtrain.status", str(tmp_path), "--watch"]
    watching = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    time.sleep(3)
    run.write_status("done", 7)
    time.sleep(4)
    watching.send_signal(signal.SIGINT)
    said = watching.communicate(timeout=30)[0]
    assert watching.returncode == 0
    assert "done" in said and "7" in said
