"""Callbacks: they look on, may end a run as its horizon does, and remember through a kill."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmtrain.callback.early_stopping import EarlyStopping
from llmtrain.folder import RunFolder
from llmtrain.hooks import Hooks
from llmtrain.metrics import read_records
from tests.conftest import ROOT, SMALL, Command, wait_until
from tests.test_compose import compose_config
from tests.test_run import QUICK, is_gone, learned_records

STOPPING = [
    "callback=early_stopping",
    "callback.early_stopping.patience=5",
    "callback.early_stopping.min_delta=100",  # never reached: the first evaluation stays the best
]


def told(losses: list[float], **settings: Any) -> Hooks:
    """Early stopping that has seen evaluations with some losses, and steps between them."""
    hooks = Hooks({"early_stopping": EarlyStopping(**settings)})
    for number, loss in enumerate(losses):
        hooks.tell({"step": 10 * number + 5, "loss": loss})
        hooks.tell({"step": 10 * number + 10, "eval_loss": loss})
    return hooks


@pytest.mark.parametrize(
    ("losses", "min_delta", "ends"),
    [
        ([3.0, 2.9, 2.8, 2.7, 2.6], 0.0, False),
        ([3.0, 2.9, 2.9, 2.95], 0.0, True),
        ([3.0, 3.1, 2.9, 3.0, 2.8, 3.0], 0.0, False),
        ([3.0, 2.95, 2.89, 2.85], 0.1, False),
        ([3.0, 2.95, 2.91], 0.1, True),
    ],
)
def test_early_stopping_waits_for_the_loss_to_fall(
    losses: list[float], min_delta: float, ends: bool
) -> None:
    hooks = told(losses, patience=2, min_delta=min_delta)
    assert (hooks.reason is not None) is ends


def test_what_a_callback_remembers_follows_from_the_records() -> None:
    settings = {"patience": 3, "min_delta": 0.0}
    rows = [{"step": step, "eval_loss": loss} for step, loss in [(1, 3.0), (2, 3.1), (3, 3.2)]]
    rollback = {"step": 4, "rollback": 1, "reason": "", "from_step": 5, "to_step": 3}
    hooks = Hooks.resumed({"mine": EarlyStopping(**settings)}, [*rows, rollback])
    assert hooks.reason is None
    hooks.tell({"step": 4, "eval_loss": 3.3})
    assert hooks.reason == "callback.mine: the held-out loss stayed at 3.0000 for 3 evaluations"


def test_several_callbacks_each_have_their_keys() -> None:
    config = compose_config("callback=[none,early_stopping]", "callback.early_stopping.patience=7")
    assert list(config.callback) == ["early_stopping"]
    assert config.callback["early_stopping"].patience == 7
    assert compose_config("callback=none").callback == {}


def test_a_run_that_is_stopped_early_is_done_also_when_it_was_killed(command: Command) -> None:
    words = [*QUICK, *STOPPING, "train.max_steps=400", "hardware=cpux2", "train.log_every=7"]
    ended = command.run(*words, "name=straight")
    assert ended.returncode == 0, ended.stderr
    reason = "callback.early_stopping: the held-out loss stayed at"
    assert f"Ended early by {reason}" in ended.stdout
    straight = RunFolder(command.only_run())
    status, summary = straight.read_status(), json.loads(straight.summary.read_text())
    assert (status["state"], status["step"], status["last_checkpoint"]) == ("done", 60, 60)
    assert summary["num_steps"] == 60
    assert summary["ended_by"].startswith(reason)
    assert (straight.final / "model.safetensors").exists()
    last = [r["step"] for r in read_records(straight.metrics) if "loss" in r][-1]
    assert last == 60  # though 60 is no multiple of 7

    started = command.start(*words, "name=killed")
    wait_until(lambda: len(command.runs()) == 2)
    killed = RunFolder(next(path for path in command.runs() if path != straight.path))
    wait_until(lambda: killed.newest_step >= 25)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate(timeout=60)
    wait_until(is_gone(command.folder), 60)
    assert killed.read_status()["state"] == "running"
    assert command.run(*words, "name=killed").returncode == 0
    assert learned_records(killed.path) == learned_records(straight.path)

    again = command.run(*words, "name=killed")
    assert again.returncode == 0
    assert "is done" in again.stdout


WITNESS = '''
"""Prints what it is told."""

from dataclasses import dataclass

from llmtrain.callback.base import Callback
from llmtrain.schema import unlearned


@dataclass
class Witness(Callback):
    """Fails at an evaluation, if it is told to."""

    kind: str = unlearned("witness")
    fails_at: int | None = unlearned()

    def on_step(self, record):
        print("on_step", record["step"], record["loss"] > 0)

    def on_eval(self, record):
        print("on_eval", record["step"])
        if record["step"] == self.fails_at:
            raise KeyError("no such thing")

    def on_save(self, step, path):
        print("on_save", step, (path / "state.json").exists())

    def on_epoch_end(self, epoch):
        print("on_epoch_end", epoch)

    def resume(self, records):
        print("resume", len(records))
'''
WITNESS_YAML = """
# @package callback.witness
defaults: [/schema/callback/witness@_here_, _self_]
"""


@pytest.fixture
def own_copy(tmp_path: Path) -> Path:
    """The program with a callback of the user's: one Python file and one YAML file."""
    copy = tmp_path / "copy"
    for name in ("llmtrain", "launchers", "hydra_plugins", "conf"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "llmtrain" / "callback" / "witness.py").write_text(WITNESS)
    (copy / "conf" / "callback" / "witness.yaml").write_text(WITNESS_YAML.lstrip())
    return copy


def test_a_callback_of_ones_own_is_one_file_and_one_yaml(command: Command, own_copy: Path) -> None:
    def run(*more: str) -> "subprocess.CompletedProcess[str]":
        own = ["callback=[early_stopping,witness]", "train.max_steps=12", "train.eval_every=4"]
        words = command.words("run", *SMALL, *own, "hardware=cpux1", "train.log_every=3", *more)
        environment = os.environ | {"PYTHONPATH": str(own_copy)}
        return subprocess.run(
            [*words, "train.global_batch=512", "checkpoint.every=50"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=command.folder,
            env=environment,
        )

    failed = run("callback.witness.fails_at=8")
    assert failed.returncode == 1
    said = "Training failed: callback.witness failed in on_eval: KeyError('no such thing')."
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr
    folder = RunFolder(command.only_run())
    assert folder.checkpoint_steps() == [8]  # it was saved for this

    ended = run()
    assert ended.returncode == 0, ended.stderr
    log = folder.log(0).read_text()
    lines = [line for line in log.splitlines() if line.startswith(("on_", "resume"))]
    assert "witness.py" in log  # where it failed
    assert lines.count("resume 0") == 1
    after = lines[lines.index("resume 5") :]  # steps 1, 3, 6 and evaluations 4, 8
    steps = [line for line in after if line.startswith(("on_step", "on_eval"))]
    assert steps == ["on_step 9 True", "on_step 12 True", "on_eval 12"]
    assert "on_save 12 True" in after
    assert "on_epoch_end 1" in lines
