"""What follows the end of a run: the user's command, and a shutdown that is a script here.

No test shuts anything down: wherever one could, its command is a script that leaves a file.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmtrain.errors import DONE, FAILED, STOPPED, ConfigError
from llmtrain.folder import RunFolder
from llmtrain.on_finish import SYSTEMD, Afterwards, OnFinish, Shutdown, words_to_shut_down
from tests.conftest import Command, wait_until
from tests.test_run import LONG, QUICK, steps_of

NOBODY = 65534


def script(path: Path, *lines: str) -> Path:
    """A program that anybody may run."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def asking(command: Command, shutdown: str, *overrides: str) -> list[str]:
    """A run that asks for both: each script writes a line into a file of its name."""
    folder = command.folder
    notify = script(folder / "notify", f'echo "$LLMTRAIN_STATE $LLMTRAIN_RUN" >> {folder}/notified')
    off = script(folder / "off", f"echo off >> {folder}/shut_down")
    return [
        *QUICK,
        "hardware=cpux1",
        f"on_finish.command={notify}",
        f"on_finish.shutdown={shutdown}",
        f"on_finish.shutdown_command={off}",
        "on_finish.delay_seconds=0",
        *overrides,
    ]


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_run_that_is_done_is_followed_once_and_keeps_its_exit_code(command: Command) -> None:
    words = asking(command, "success", "train.max_steps=2")
    with (command.folder / "notify").open("a") as file:
        file.write("exit 3\n")
    ended = command.run(*words)
    assert ended.returncode == 0, ended.stderr
    assert lines_of(command.folder / "notified") == [f"done {command.only_run().resolve()}"]
    assert lines_of(command.folder / "shut_down") == ["off"]
    assert "on_finish.command failed with exit code 3." in ended.stderr.splitlines()

    again = command.run(*words)
    assert again.returncode == 0
    assert "is done" in again.stdout
    assert len(lines_of(command.folder / "notified")) == 1
    assert len(lines_of(command.folder / "shut_down")) == 1


def test_a_run_that_fails_is_followed_by_a_shutdown_that_is_always_wanted(
    command: Command,
) -> None:
    diverging = [
        "optimizer=adamw",
        "optimizer.lr=1e30",
        "train.precision=fp32",
        "on_divergence.max_skipped_steps=1",
    ]
    words = [*diverging, "train.eval_every=1", "train.max_steps=5"]
    ended = command.run(*asking(command, "always", *words))
    assert ended.returncode == 1
    assert lines_of(command.folder / "notified") == [f"failed {command.only_run().resolve()}"]
    assert lines_of(command.folder / "shut_down") == ["off"]


def test_a_run_that_the_user_stops_leaves_the_machine_on(command: Command) -> None:
    started = command.start(*asking(command, "always", LONG))
    wait_until(lambda: bool(command.runs()) and len(steps_of(command.only_run())) > 3)
    os.kill(started.pid, signal.SIGINT)
    started.communicate(timeout=60)
    assert started.returncode == 75
    assert lines_of(command.folder / "notified") == [f"stopped {command.only_run().resolve()}"]
    assert lines_of(command.folder / "shut_down") == []


def test_the_countdown_comes_after_the_last_point_and_ctrl_c_cancels_it(command: Command) -> None:
    words = asking(command, "success", "train.max_steps=2")
    started = command.start("-m", *words, "seed=0,1", "on_finish.delay_seconds=600")
    assert started.stderr is not None
    before = next(line for line in started.stderr if "Ctrl+C cancels" in line)
    assert before == "Shutting this machine down in 600 s; Ctrl+C cancels.\n"
    assert [RunFolder(path).read_status()["state"] for path in command.runs()] == ["done"] * 2
    os.kill(started.pid, signal.SIGINT)
    after = started.communicate(timeout=60)[1]
    assert after == "The shutdown is cancelled.\n"
    assert started.returncode == 0
    assert len(lines_of(command.folder / "notified")) == 2
    assert lines_of(command.folder / "shut_down") == []


def test_a_job_of_a_cluster_may_not_shut_a_machine_down(command: Command) -> None:
    words = ["launcher=slurm", "launcher.submit=false", "train.max_steps=2"]
    ended = command.run(*asking(command, "always", *words))
    assert ended.returncode == 2
    assert "on_finish.shutdown=always is for your own machine" in ended.stderr


def test_a_rehearsal_is_followed_by_nothing(command: Command) -> None:
    ended = command.run(*asking(command, "always", "train.max_steps=2", "launcher=dry"))
    assert ended.returncode == 0, ended.stderr
    assert lines_of(command.folder / "notified") == lines_of(command.folder / "shut_down") == []


@pytest.mark.parametrize(
    ("shutdown", "codes"), [("never", []), ("success", [DONE]), ("always", [DONE, FAILED])]
)
def test_the_machine_is_shut_down_after_the_ends_that_were_asked_for(
    shutdown: str, codes: list[int], tmp_path: Path
) -> None:
    after = []
    for code in (DONE, FAILED, STOPPED):
        off = tmp_path / str(code)
        asked = OnFinish(Shutdown(shutdown), 0.0, shutdown_command=f"touch {off}")
        afterwards = Afterwards()
        afterwards.shut_down(code)
        assert not off.exists(), "no run was trained"
        with afterwards.follow(asked, tmp_path):
            pass
        afterwards.shut_down(code)
        after += [code] if off.exists() else []
    assert after == codes


def test_a_rented_machine_is_shut_down_too_where_the_data_cannot_be_prepared(
    command: Command,
) -> None:
    broken = command.folder / "texts"
    broken.mkdir()
    (broken / "only.txt").write_text("too little")
    off = command.folder / "off"
    ended = command.run(
        "data=text",
        f"data.path={broken}",
        "on_finish.shutdown=always",
        "on_finish.delay_seconds=0",
        f"on_finish.shutdown_command='touch {off}'",
    )
    assert ended.returncode == 2, ended.stderr
    assert off.exists()


def test_a_shutdown_that_fails_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    OnFinish(Shutdown.always, 0.0, shutdown_command="false").shut_down()
    OnFinish(Shutdown.always, 0.0, shutdown_command="no_such_program").shut_down()
    said = capfd.readouterr().err.splitlines()[1::2]
    assert said[0] == "on_finish.shutdown_command failed with exit code 1."
    assert said[1].startswith("The machine was not shut down: on_finish.shutdown_command=no_such_")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of programs that goes before all others, where anybody can read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        monkeypatch.setenv("PATH", os.pathsep.join([name, os.environ["PATH"]]))
        yield Path(name)


@contextmanager
def as_nobody() -> Iterator[None]:
    """What is done inside is done without root's rights."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_shutdown_that_this_user_may_not_do_is_refused_before_training(
    programs: Path,
) -> None:
    off, asked = (
        script(programs / "poweroff"),
        OnFinish(Shutdown.always, shutdown_command="poweroff"),
    )
    script(programs / "sudo", "exit 1")
    refusal = pytest.raises(ConfigError, match="needs a right that this user has not; run as root")
    with as_nobody(), refusal:
        asked.check()
    script(programs / "sudo")
    with as_nobody():
        assert words_to_shut_down("poweroff -f") == ["sudo", "-n", str(off), "-f"]


@pytest.mark.skipif(SYSTEMD.is_dir(), reason="systemd runs this machine, so it can shut it down")
def test_a_shutdown_that_no_systemd_would_hear_is_refused(programs: Path) -> None:
    (programs / "shutdown").symlink_to(script(programs / "systemctl"))
    with pytest.raises(ConfigError, match="this is a container"):
        OnFinish(Shutdown.success).check()


def test_a_shutdown_command_that_does_not_exist_is_refused(command: Command) -> None:
    off = "on_finish.shutdown_command=stop_the_machine now"
    refused = command.run(*QUICK, "hardware=cpux1", "on_finish.shutdown=success", off)
    assert refused.returncode == 2
    said = "on_finish.shutdown_command=stop_the_machine now is no program of this machine; give one"
    assert refused.stderr.startswith(said)
    assert refused.stderr.count("\n") == 1
    assert command.runs() == []
