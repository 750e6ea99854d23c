"""Runs that are told to stop, and ranks that die or hang: the whole group ends or starts again."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from launchers.group import RankGroup
from launchers.watch import HangWatch
from llmtrain.errors import ConfigError, OutOfMemory, TrainingError, is_final
from llmtrain.folder import RunFolder
from llmtrain.heartbeat import Beat, Heartbeat, Heartbeats
from llmtrain.restarts import Reached, Restarts
from tests.conftest import ROOT, SMALL, Command, ranks_below, wait_until
from tests.test_run import LONG, has_saved, is_gone, steps_of

WORDS = [*SMALL, "train.log_every=1", "train.eval_every=1000", "hardware=cpux2"]
RARELY = "checkpoint.every=10000"
STACK = "most recent call first"


def has_stepped(command: Command, beyond: int = 3) -> Callable[[], bool]:
    """Whether the run has recorded more than some step."""
    return lambda: any(max(steps_of(path), default=0) > beyond for path in command.runs())


def ended(started: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit code of a command and what it said on stderr."""
    said = started.communicate(timeout=300)[1]
    return started.returncode, said


def test_a_request_to_a_rank_or_to_the_launcher_stops_all_with_a_checkpoint(
    command: Command,
) -> None:
    last = 0
    for number, to_rank in ((signal.SIGTERM, True), (signal.SIGUSR2, False)):
        started = command.start(*WORDS, RARELY, "train.max_steps=4000")
        wait_until(has_stepped(command, last + 3))
        os.kill(ranks_below(command.folder)[1] if to_rank else started.pid, number)
        code, said = ended(started)
        assert code == 75, said
        assert "Traceback" not in said
        folder = RunFolder(command.only_run())
        assert folder.read_status()["state"] == "stopped"
        last = steps_of(folder.path)[-1]
        assert folder.checkpoint_steps()[-1] == last
        assert steps_of(folder.path) == list(range(1, last + 1))
        assert is_gone(command.folder)()


def test_a_rank_that_is_halted_ends_the_group_with_the_stacks_of_all(command: Command) -> None:
    started = command.start(*WORDS, LONG, RARELY, "launcher.hang_floor_seconds=5")
    wait_until(has_stepped(command))
    os.kill(ranks_below(command.folder)[1], signal.SIGSTOP)
    code, said = ended(started)
    assert code == 1
    assert "Training failed: Rank 1 hangs: it was halted by a signal after step" in said
    assert is_gone(command.folder)()
    folder = RunFolder(command.only_run())
    for rank in range(2):
        assert STACK in folder.log(rank).read_text()
        assert "train_to_end" in folder.log(rank).read_text()


# A library that keeps Python's lock: nothing else in the process goes on.
HOLD_THE_LOCK = """
import ctypes, os, threading, time
def hold():
    while not os.path.exists(os.environ["HANG_WHEN"]):
        time.sleep(0.1)
    ctypes.PyDLL(None).sleep(1000)
if os.environ.get("RANK") == "1":
    threading.Thread(target=hold, daemon=True).start()
"""


def test_a_rank_that_takes_no_more_steps_ends_the_group_with_the_stacks_of_all(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOLD_THE_LOCK)
    monkeypatch.setenv("HANG_WHEN", str(tmp_path / "now"))
    words = command.words("run", *WORDS, LONG, RARELY, "launcher.hang_floor_seconds=5")
    started = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=command.folder,
        env=command.environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    wait_until(has_stepped(command))
    (tmp_path / "now").touch()
    code, said = ended(started)
    assert code == 1
    assert "Training failed: The ranks hang: no step after step " in said
    assert is_gone(command.folder)()
    folder = RunFolder(command.only_run())
    assert "in hold" in folder.log(1).read_text()
    assert all(STACK in folder.log(rank).read_text() for rank in range(2))


def test_a_run_that_may_restart_continues_from_its_newest_checkpoint(command: Command) -> None:
    words = [*WORDS, "train.max_steps=60", "checkpoint.every=5", "launcher.max_restarts=2"]
    started = subprocess.Popen(
        command.words("run", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=command.folder,
        env=command.environment,
    )
    wait_until(has_saved(command, 5))
    os.kill(ranks_below(command.folder)[0], signal.SIGKILL)
    said = started.communicate(timeout=120)[0]
    assert started.returncode == 0, said
    told = "Rank 0 was killed by signal 9 (out of memory?). Restart 1 of 2 from step "
    assert [line for line in said.splitlines() if line.startswith(told)]
    folder = RunFolder(command.only_run())
    assert folder.read_status()["restarts"] == 1
    assert steps_of(folder.path) == list(range(1, 61))


def test_what_would_fail_again_is_final_and_what_may_pass_is_not() -> None:
    assert is_final(ConfigError("name", "x", "is wrong", "mend it"))
    assert is_final(TrainingError("The loss is nan."))
    assert not is_final(OutOfMemory(MemoryError("out of memory"), num_steps=500))
    assert not is_final(RuntimeError("Connection closed by peer"))


@pytest.mark.parametrize("again", [False, True])
def test_ranks_that_cannot_save_are_left_at_the_end_of_the_grace_time_or_at_once(
    command: Command, again: bool
) -> None:
    grace = "launcher.grace_seconds=" + ("10000" if again else "1")
    started = command.start(*WORDS, LONG, "checkpoint.every=5", grace, "hardware=cpux1")
    wait_until(has_saved(command, 5))
    os.kill(ranks_below(command.folder)[0], signal.SIGSTOP)
    saved = RunFolder(command.only_run()).checkpoint_steps()
    os.kill(started.pid, signal.SIGINT)
    if again:
        time.sleep(1)  # two signals that are sent at once arrive as one
        os.kill(started.pid, signal.SIGINT)
    code, said = ended(started)
    assert code == 75, said
    assert "the newest checkpoint stays" in said
    assert is_gone(command.folder)()
    assert RunFolder(command.only_run()).checkpoint_steps() == saved
    assert RunFolder(command.only_run()).read_status()["state"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_stop_before_there_are_ranks_is_one_too(command: Command, number: signal.Signals) -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", STOPPED_EARLY, str(int(number)), *command.words("run")[3:]],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=command.folder,
        env=command.environment,
    )
    assert ended(started) == (75, "Stopped before training began.\n")


STOPPED_EARLY = """
import os, sys, unittest.mock
number = int(sys.argv.pop(1))
from llmtrain import run
from llmtrain.data import shards
stop = lambda *_, **__: os.kill(os.getpid(), number)
with unittest.mock.patch.object(shards, "prepare", stop):
    sys.exit(run.main())
"""


def test_ranks_that_fail_twice_at_the_same_step_are_not_started_a_third_time() -> None:
    restarts = Restarts(5)
    assert restarts.is_worth_one(Reached(checkpoint=10, step=14))
    assert restarts.is_worth_one(Reached(checkpoint=10, step=17))
    assert not restarts.is_worth_one(Reached(checkpoint=10, step=17))
    assert not Restarts(0).is_worth_one(Reached(checkpoint=10, step=14))


@pytest.fixture
def beats() -> Iterator[Heartbeats]:
    with closing(Heartbeats(2)) as found:
        yield found


@pytest.fixture
def group() -> Iterator[RankGroup]:
    """Two processes that do nothing, as ranks that hang."""
    with RankGroup([sys.executable, "-c", "import time; time.sleep(60)"], 2, {}) as started:
        yield started


def looked(watch: HangWatch) -> str | None:
    """What a watch says after a moment in which nothing happens."""
    for _ in range(4):
        said = watch.cause()
        time.sleep(0.05)
    return said


def test_the_rank_that_signed_first_is_blamed_for_a_hang(
    group: RankGroup, beats: Heartbeats
) -> None:
    ranks = [Heartbeat(beats.memory, place) for place in range(2)]
    for rank in (0, 1, 0):  # rank 0 is the last to sign: it waits for rank 1
        ranks[rank].give(Beat(7, step_seconds=0.01, is_stepping=True))
    said = looked(HangWatch(group, beats, factor=2, floor_seconds=0.1))
    assert said is not None
    assert said.startswith("The ranks hang: no step after step 7 for ")
    assert said.endswith("rank 1 was the first to fall silent.")


def test_starting_evaluating_and_saving_are_no_hang(group: RankGroup, beats: Heartbeats) -> None:
    watch = HangWatch(group, beats, factor=2, floor_seconds=0.01)
    assert looked(watch) is None
    rank = Heartbeat(beats.memory, 0)
    rank.stepped(1)
    with rank.aside():
        assert looked(watch) is None
    assert beats.of(0).is_stepping
    rank.rest()
    assert looked(watch) is None


def test_a_rank_that_keeps_stepping_or_has_long_steps_does_not_hang(
    group: RankGroup, beats: Heartbeats
) -> None:
    watch = HangWatch(group, beats, factor=2, floor_seconds=0.1)
    rank = Heartbeat(beats.memory, 0)
    for step in range(5):
        rank.give(Beat(step, is_stepping=True))
        assert watch.cause() is None
        time.sleep(0.05)
    rank.give(Beat(5, step_seconds=60.0, is_stepping=True))
    assert looked(watch) is None
    assert HangWatch(group, beats, factor=None, floor_seconds=0.01).cause() is None


def test_a_folder_whose_holder_died_is_taken_over_and_a_living_holder_is_named(
    tmp_path: Path,
) -> None:
    script = (
        "import sys, time; from llmtrain.folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    who = f"process {other.pid} on {socket.gethostname()}"
    with pytest.raises(Exception, match=f"is being trained by {who}"), RunFolder(tmp_path).lock(0):
        pass
    other.kill()
    other.communicate()
    with RunFolder(tmp_path).lock() as left_by:
        assert left_by == who
    with RunFolder(tmp_path).lock() as left_by:
        assert left_by is None
