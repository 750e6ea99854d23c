"""The command as a user has it: from one line to a finished folder, through kills and mistakes."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.folder import RunFolder
from llmtrain.metrics import read_records
from tests.conftest import SMALL, Command, ranks_below, wait_until

QUICK = [*SMALL, "train.log_every=1", "train.eval_every=10", "checkpoint.every=5"]
TIMES = {"tokens_per_second", "samples_per_second", "mfu", "memory_gib", "step_seconds"}
TIMES |= {"elapsed_seconds"}
LONG = "train.max_steps=400"


def learned_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without what depends on the clock."""
    return [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_records(RunFolder(folder).metrics)
    ]


def steps_of(folder: Path) -> list[int]:
    return [r["step"] for r in read_records(RunFolder(folder).metrics) if "loss" in r]


def has_saved(command: Command, least: int) -> Callable[[], bool]:
    """Whether the run has a checkpoint of at least some step."""
    return lambda: any(
        max(RunFolder(p).checkpoint_steps(), default=0) >= least for p in command.runs()
    )


def is_gone(folder: Path) -> Callable[[], bool]:
    return lambda: not ranks_below(folder)


def test_one_line_leaves_a_finished_folder_and_the_same_line_says_so(command: Command) -> None:
    # The plan takes stage 0 or 1, as fits the machine; at 0 alone Muon's norm is known.
    words = [*QUICK, "train.max_steps=20", "hardware=cpux2", "zero.stage=0"]
    ended = command.run(*words)
    assert ended.returncode == 0, ended.stderr
    assert "bits per byte" in ended.stdout
    assert "xz -9" in ended.stdout
    assert "python -m llmtrain.generate" in ended.stdout
    folder = RunFolder(command.only_run())
    for path in (
        folder.config,
        folder.plan,
        folder.overrides,
        folder.status,
        folder.metrics,
        folder.samples,
        folder.environment,
        folder.deepspeed,
        folder.log(1),
        folder.best / "config.json",
        folder.final / "model.safetensors",
        folder.final / "tokenizer.json",
        folder.final / "README.md",
    ):
        assert path.exists(), path
    assert list(folder.tensorboard.iterdir())
    status = folder.read_status()
    assert status["state"] == "done"
    assert status["step"] == status["num_steps"] == status["last_checkpoint"] == 20
    assert status["error"] is None
    record = read_records(folder.metrics)[0]
    assert {"step", "loss", "lr", "grad_norm", "skipped_steps", "tokens"} | TIMES == set(record)
    assert record["grad_norm"] > 0
    assert steps_of(folder.path) == list(range(1, 21))
    assert any("eval_bits_per_byte" in record for record in read_records(folder.metrics))

    again = command.run(*words)
    assert again.returncode == 0
    assert "is done" in again.stdout
    assert steps_of(folder.path) == list(range(1, 21))

    written = subprocess.run(
        [
            *command.words("generate")[:3],
            str(folder.path),
            "--prompt",
            "def ",
            "--max-new-tokens",
            "5",
        ],
        capture_output=True,
        text=True,
        env=command.environment,
        check=False,
    )
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("def ")
    assert "tok/s" in written.stderr


def test_a_run_killed_with_its_parent_continues_to_the_same_metrics(command: Command) -> None:
    words = [*QUICK, "train.max_steps=60", "hardware=cpux2", "train.log_every=7"]
    assert command.run(*words, "name=straight").returncode == 0
    straight = command.only_run()

    started = command.start(*words, "name=killed")
    killed = straight.with_name(straight.name.replace("straight", "killed"))
    wait_until(lambda: max(RunFolder(killed).checkpoint_steps(), default=0) >= 10)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate(timeout=60)
    wait_until(is_gone(command.folder), 60)
    assert RunFolder(killed).read_status()["state"] == "running"

    assert command.run(*words, "name=killed").returncode == 0
    assert RunFolder(killed).read_status()["state"] == "done"
    assert learned_records(killed) == learned_records(straight)


def test_a_rank_that_is_killed_ends_the_others_and_the_run_continues(command: Command) -> None:
    words = [*QUICK, LONG, "hardware=cpux2"]
    started = command.start(*words)
    wait_until(has_saved(command, 5))
    os.kill(ranks_below(command.folder)[-1], signal.SIGKILL)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 1
    assert "Training failed: Rank 1 was killed by signal 9" in said
    assert "Traceback" not in said
    assert is_gone(command.folder)()
    assert RunFolder(command.only_run()).read_status()["state"] == "failed"

    started = command.start(*words)
    before = max(RunFolder(command.only_run()).checkpoint_steps())
    wait_until(has_saved(command, before + 5))
    os.kill(started.pid, signal.SIGINT)
    started.communicate(timeout=60)
    assert started.returncode == 75
    steps = steps_of(command.only_run())
    assert steps == list(range(1, len(steps) + 1))


def test_ctrl_c_stops_with_a_checkpoint_of_the_last_step(command: Command) -> None:
    started = command.start(*QUICK, LONG, "hardware=cpux1", "checkpoint.every=1000")
    wait_until(lambda: bool(command.runs()) and len(steps_of(command.only_run())) > 3)
    os.kill(started.pid, signal.SIGINT)
    started.communicate(timeout=60)
    folder = RunFolder(command.only_run())
    assert started.returncode == 75
    assert is_gone(command.folder)()
    assert folder.read_status()["state"] == "stopped"
    assert folder.checkpoint_steps() == [steps_of(folder.path)[-1]]


def test_ctrl_c_before_the_first_step_is_a_stop_and_no_failure(command: Command) -> None:
    started = command.start(*QUICK, LONG, "hardware=cpux2")
    wait_until(lambda: len(ranks_below(command.folder)) == 2)
    os.kill(started.pid, signal.SIGINT)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 75, said
    assert "Traceback" not in said
    assert is_gone(command.folder)()


def test_a_run_started_with_nohup_outlives_its_terminal(command: Command) -> None:
    words = [*QUICK, "train.max_steps=40", "hardware=cpux1"]
    started = subprocess.Popen(
        ["nohup", *command.words("run", *words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=command.folder,
        env=command.environment,
    )
    wait_until(has_saved(command, 5))
    os.kill(started.pid, signal.SIGHUP)
    assert started.wait(timeout=120) == 0
    assert RunFolder(command.only_run()).read_status()["state"] == "done"


def test_a_second_start_on_the_same_folder_is_refused(command: Command) -> None:
    words = [*QUICK, "train.max_steps=40000", "hardware=cpux1"]
    started = command.start(*words)
    wait_until(lambda: bool(command.runs()) and ranks_below(command.folder) != [])
    second = command.run(*words)
    assert second.returncode == 2
    assert f"is being trained by process {started.pid}" in second.stderr
    os.kill(started.pid, signal.SIGKILL)
    started.communicate(timeout=60)
    wait_until(is_gone(command.folder), 60)


def test_other_data_under_the_same_name_are_refused(command: Command, tmp_path: Path) -> None:
    words = [*QUICK, "train.max_steps=2", "hardware=cpux1"]
    assert command.run(*words).returncode == 0
    other = tmp_path / "other"
    other.mkdir()
    for path in list(command.corpus.iterdir())[:6]:
        (other / path.name).write_text(path.read_text())
    refused = command.run(*words, f"data.path={other}")
    assert refused.returncode == 2
    assert "holds a run on other data" in refused.stderr
    assert len(command.runs()) == 1


def test_a_multirun_leaves_a_folder_a_point_and_survives_a_bad_one(command: Command) -> None:
    words = [*QUICK, "train.max_steps=2", "hardware=cpux1"]
    ended = command.run("-m", *words, "seed=0,1", "train.precision=fp32,fp16")
    assert ended.returncode == 1
    assert len(command.runs()) == 2
    assert ended.stderr.count("train.precision=fp16 has no kernels") == 2
    assert all(RunFolder(path).read_status()["state"] == "done" for path in command.runs())
    assert {path.name for path in command.folder.iterdir()} == {"outputs"}


def test_two_points_that_learn_the_same_are_refused(command: Command) -> None:
    words = [*QUICK, "train.max_steps=2", "hardware=cpux1"]
    ended = command.run("-m", *words, "zero.stage=0,1")
    assert ended.returncode == 1
    assert "is the name of two points that learn the same" in ended.stderr
    assert len(command.runs()) == 1


def test_debug_shows_a_batch_and_takes_few_steps_in_a_folder_of_its_own(command: Command) -> None:
    ended = command.run(*QUICK, LONG, "hardware=cpux1", "debug=true")
    assert ended.returncode == 0, ended.stderr
    assert command.only_run().name.endswith("-debug")
    assert len(steps_of(command.only_run())) == 5
    assert "first batch" in ended.stdout


def test_an_error_in_a_rank_is_one_line_with_its_cause(command: Command) -> None:
    words = [*QUICK, "train.max_steps=5", "hardware=cpux2", "zero.stage=0", "optimizer=adamw"]
    ended = command.run(
        *words,
        "optimizer.lr=1e30",
        "train.precision=fp32",
        "train.eval_every=1",
        "on_divergence.max_skipped_steps=1",
    )
    assert ended.returncode == 1
    assert "lower optimizer.lr" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert json.loads(RunFolder(command.only_run()).status.read_text())["state"] == "failed"


def test_resume_never_keeps_the_earlier_run_beside(command: Command) -> None:
    words = [*QUICK, "train.max_steps=2", "hardware=cpux1"]
    assert command.run(*words).returncode == 0
    assert command.run(*words, "resume=never").returncode == 0
    assert len(command.runs()) == 2
    assert all(len(steps_of(path)) == 2 for path in command.runs())
