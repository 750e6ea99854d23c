"""Machines without Slurm meet at an address, and whoever does not come is named."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.folder import RunFolder
from llmtrain.meeting import slow_line
from tests.conftest import SMALL, Command
from tests.test_run import steps_of

WORDS = [*SMALL, "train.max_steps=20", "train.log_every=1", "hardware=cpux1", "zero.stage=0"]
WORDS += ["launcher=slurm", "launcher.submit=false", "hardware.num_nodes=2"]


def planned(command: Command, *words: str) -> Path:
    shown = command.run(*WORDS, *words)
    assert shown.returncode == 0, shown.stderr
    return command.only_run()


def node(command: Command, folder: Path, rank: int, meeting: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "llmtrain.node", str(folder), "--num-nodes", "2"]
    words += ["--rendezvous", meeting, "--node-rank", str(rank)]
    return subprocess.Popen(
        words, cwd=command.folder, env=command.environment, stderr=subprocess.PIPE, text=True
    )


def free_port(family: int) -> int:
    with socket.socket(family) as probe:
        probe.bind(("localhost" if family == socket.AF_INET else "::1", 0))
        return int(probe.getsockname()[1])


def has_ipv6() -> bool:
    try:
        return free_port(socket.AF_INET6) > 0
    except OSError:
        return False


@pytest.mark.parametrize("host", ["localhost", "[::1]", socket.gethostname()])
def test_two_machines_meet_at_a_name_or_an_address(host: str, command: Command) -> None:
    if host == "[::1]" and not has_ipv6():
        pytest.skip("this machine has no IPv6; run it where `ping ::1` answers")
    folder = planned(command)
    family = socket.AF_INET6 if host == "[::1]" else socket.AF_INET
    meeting = f"{host}:{free_port(family)}"
    nodes = [node(command, folder, rank, meeting) for rank in range(2)]
    ended = [each.communicate(timeout=300)[1] for each in nodes]
    assert [each.returncode for each in nodes] == [0, 0], ended
    assert RunFolder(folder).read_status()["state"] == "done"
    assert steps_of(folder) == list(range(1, 21))


def test_a_machine_that_does_not_come_is_named(command: Command) -> None:
    folder = planned(command, "launcher.meeting_seconds=3")
    first = node(command, folder, 0, f"localhost:{free_port(socket.AF_INET)}")
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 1
    assert f"Rank 1 has not come in 3 s; those of {socket.gethostname()} are here." in said


def test_a_first_machine_that_does_not_answer_is_named(command: Command) -> None:
    folder = planned(command, "launcher.meeting_seconds=3")
    meeting = f"localhost:{free_port(socket.AF_INET)}"
    second = node(command, folder, 1, meeting)
    said = second.communicate(timeout=120)[1]
    assert second.returncode == 1
    assert f"Nobody answers at {meeting} in 3 s" in said
    assert "Traceback" not in said


def test_a_rank_that_is_much_slower_than_most_is_named() -> None:
    even = [("a", 10.0), ("a", 9.0), ("b", 11.0), ("b", 8.0)]
    assert slow_line(even) is None
    assert slow_line([*even, ("c", 3.0)]) == "slower than the median: rank 4 on c at 33%"
