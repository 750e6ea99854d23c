"""The processes of one run on this machine: started, signalled and ended together."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from launchers.place import Place
from launchers.warm import Fork, can_fork
from llmtrain.errors import STOPPED

POLL_SECONDS = 0.2
MOST_SECONDS_TO_DIE = 30.0  # a process that waits for a broken device outlives even SIGKILL


class RankGroup:
    """One process for each rank, with its place in the environment. ``with`` leaves none behind.

    Here ranks are numbered from 0 on this machine, but for ``failures``, which others read. Each
    has a session of its own, so that Ctrl+C reaches the launcher alone.
    """

    def __init__(
        self,
        command: Sequence[str],
        num_ranks: int,
        environment: dict[str, str],
        inherited: Sequence[int] = (),
        place: Place = Place(),  # noqa: B008  (frozen)
    ) -> None:
        self.command = command
        self.num_ranks = num_ranks
        self.environment = os.environ | environment
        self.inherited = inherited
        self.first_rank = place.node * num_ranks
        self.world_size = place.num_nodes * num_ranks
        self.processes: dict[int, subprocess.Popen[bytes] | Fork] = {}
        self.codes: dict[int, int] = {}

    def __enter__(self) -> "RankGroup":
        try:
            for rank in range(self.num_ranks):
                self.processes[rank] = self.start(rank)
        except OSError:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self, rank: int) -> "subprocess.Popen[bytes] | Fork":
        place = {"RANK": str(self.first_rank + rank), "LOCAL_RANK": str(rank)}
        number = {"WORLD_SIZE": str(self.world_size), "LOCAL_WORLD_SIZE": str(self.num_ranks)}
        environment = self.environment | number | place
        if can_fork(environment):
            return Fork(self.command, environment)
        return subprocess.Popen(
            self.command,
            env=environment,
            pass_fds=self.inherited,
            start_new_session=True,
        )

    def look(self) -> None:
        """Note the exit codes of those that ended since, in that order."""
        for rank, process in self.processes.items():
            code = process.poll()
            if code is not None:
                self.codes.setdefault(rank, code)

    @property
    def living(self) -> list[int]:
        """The ranks that were alive at the last look."""
        return [rank for rank in self.processes if rank not in self.codes]

    @property
    def failures(self) -> dict[int, int]:
        """The exit codes of those that failed, the first to fail first.

        None did where one left because it was asked to, before there was anything to save: its
        peers then fail for lack of it.
        """
        if STOPPED in self.codes.values():
            return {}
        return {self.first_rank + rank: code for rank, code in self.codes.items() if code != 0}

    @property
    def is_whole(self) -> bool:
        """Whether some train on and none has failed or left."""
        return bool(self.living) and all(code == 0 for code in self.codes.values())

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for something that exit codes say, at most so long."""
        end = time.monotonic() + seconds
        self.look()
        while not condition() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            self.look()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank that still lives."""
        for process in self.processes.values():
            process.send_signal(number)

    def is_stopped(self, rank: int) -> bool:
        """Whether a process was halted from outside, as by SIGSTOP."""
        import psutil

        with suppress(psutil.Error):
            return bool(psutil.Process(self.processes[rank].pid).status() == psutil.STATUS_STOPPED)
        return False

    def kill(self) -> None:
        """End all at once."""
        self.send(signal.SIGKILL)
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(MOST_SECONDS_TO_DIE)
