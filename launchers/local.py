"""Starts one process per device of this machine, and stays with them to their end."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple

from launchers.group import POLL_SECONDS, RankGroup
from launchers.place import Place
from launchers.watch import HangWatch, hear_last_words
from llmtrain.errors import STOPPED, ConfigError
from llmtrain.folder import RunFolder
from llmtrain.heartbeat import Heartbeats
from llmtrain.schema import Part, unlearned

HERE = Place()

# glibc gives large blocks back to the kernel at every free and faults them in again at every
# allocation; on a CPU these page faults cost more than the arithmetic. Keep the blocks. This is
# for a machine without launchers.blocks, which does the same with less memory.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}

# oneDNN and torch's door to it keep what they made for each shape of a product, with its buffers;
# experts, whose shapes are new at every step, would fill hundreds of MB that are never used again.
KEEP_FEW_KERNELS = {
    name: os.environ.get(name, "64")
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
}

# Threads that wait for each other spin. libgomp's default is so long that one busy neighbour slows
# training many times over; a shorter one hardly costs a quiet machine anything.
SPIN_BRIEFLY = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}

FOR_LIBRARIES = KEEP_MEMORY | KEEP_FEW_KERNELS | SPIN_BRIEFLY


class Ended(NamedTuple):
    """How the ranks ended: the exit code of each that failed, the first to fail first.

    ``hang`` says in one line which rank took no more steps; ``step`` is the last of any rank.
    """

    failures: dict[int, int]
    was_stopped: bool
    hang: str | None = None
    step: int = 0

    @property
    def was_cut_short(self) -> bool:
        """Whether ranks ended that nobody had asked to stop."""
        return bool(self.failures or self.hang) and not self.was_stopped


@dataclass
class Local(Part):
    """This machine.

    ``grace_seconds`` is how long ranks may take to save after a request to stop. A rank hangs that
    takes no step in ``hang_factor`` times the median step (null: no rank ever does), and in at
    least ``hang_floor_seconds``. ``meeting_seconds`` is how long ranks wait for each other at the
    start. ``max_restarts`` is how often ranks that ended or hung are started
    again.
    """

    kind: str = "local"
    starts_ranks: ClassVar[bool] = True
    queues: ClassVar[bool] = False
    grace_seconds: float = unlearned(600.0, above=0)
    hang_factor: float | None = unlearned(above=1)
    hang_floor_seconds: float = unlearned(300.0, above=0)
    meeting_seconds: float = unlearned(600.0, above=0)
    max_restarts: int = unlearned(0, low=0)

    def check(self, device: str, ranks: int, num_nodes: int) -> None:
        """Raise ConfigError where this machine has not what the plan is for."""
        from llmtrain.hardware import visible_gpus

        if num_nodes > 1:
            reason = "is more than this machine"
            raise ConfigError("hardware.num_nodes", num_nodes, reason, "set it to 1")
        gpus = len(visible_gpus()) if device == "cuda" else ranks
        if ranks > gpus:
            reason = f"is more than the {gpus} GPUs that this machine shows"
            remedy = "take hardware=auto, or see the plan with python -m llmtrain.plan"
            raise ConfigError("hardware.gpus_per_node", ranks, reason, remedy)

    def launch(
        self,
        command: list[str],
        folder: RunFolder,
        ranks: int,
        threads: int,
        environment: dict[str, str],
        watch: Callable[[], None],
        place: Place = HERE,
    ) -> Ended:
        """Run ``command`` in ``ranks`` processes to their end; ``watch`` is called meanwhile.

        With a ``place`` these are one machine's, and others run the rest.

        The first rank that fails or hangs ends the others, when all have left their stacks in their
        logs. Ctrl+C, SIGTERM and SIGUSR2 ask the ranks to save and stop; a second Ctrl+C, or the
        end of the grace time, kills them.
        """
        with stop_requests() as requests, closing(Heartbeats(ranks)) as beats:
            told = shared_environment(threads, place) | environment | beats.environment
            with RankGroup(command, ranks, told, [beats.descriptor], place) as group:
                hang = self.stay_with(
                    group, HangWatch(group, beats, *self.patience), requests, watch
                )
                if group.failures or hang:
                    hear_last_words(group, lambda rank: folder.log(group.first_rank + rank))
            was_stopped = requests.is_one or STOPPED in group.codes.values()
            step = max(beats.of(rank).step for rank in range(ranks))
            return Ended(group.failures, was_stopped, hang, step)

    @property
    def patience(self) -> tuple[float | None, float]:
        return self.hang_factor, self.hang_floor_seconds

    def stay_with(
        self,
        group: RankGroup,
        hangs: HangWatch,
        requests: "StopRequests",
        watch: Callable[[], None],
    ) -> str | None:
        """Poll the ranks, show what they do, hand on a request to stop; returns how one hangs."""
        was_passed_on = False
        while group.is_whole:
            time.sleep(POLL_SECONDS)
            watch()
            if not requests.is_one:
                hang = hangs.cause()
                if hang is not None:
                    return hang
            elif not was_passed_on:
                say("Stopping after this step, with a checkpoint. Ctrl+C leaves without.")
                group.send(signal.SIGUSR2)
                was_passed_on = True
            elif requests.is_urgent or requests.age_seconds > self.grace_seconds:
                say("Leaving now: the newest checkpoint stays.")
                return None
            group.look()
        return None


class StopRequests:
    """Whether Ctrl+C, SIGTERM, SIGUSR2 or a lost terminal asked for an end, and how urgently."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.is_urgent = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, without an exception in mid-air.

        Only Ctrl+C is urgent when something came before: what ends a session may well send two of
        the others.
        """
        self.is_urgent = self.is_urgent or (self.is_one and number == signal.SIGINT)
        self.first_at = self.first_at or time.monotonic()

    @property
    def is_one(self) -> bool:
        return self.first_at is not None

    @property
    def age_seconds(self) -> float:
        """Since the first request; 0 before it."""
        return time.monotonic() - self.first_at if self.first_at is not None else 0.0


def say(line: str) -> None:
    with suppress(OSError):  # the terminal may be what was lost
        print(f"\n{line}", file=sys.stderr)


def shared_environment(threads: int, place: Place = HERE) -> dict[str, str]:
    """What every rank is told: where to meet, how many threads to use, whose child it is."""
    return (
        FOR_LIBRARIES
        | place.meeting()
        | {
            "OMP_NUM_THREADS": str(threads),
            "LLMTRAIN_PARENT": str(os.getpid()),
            "PYTHONPATH": code_path(),
            # Where DeepSpeed looks for ninja, also of an environment that was not activated.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
    )


def code_path() -> str:
    """A PYTHONPATH on which a process of ours finds this code first."""
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    here = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join([here, *filter(None, others)])


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Note requests to stop from here on, and leave each signal as it was."""
    requests = StopRequests()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous: dict[signal.Signals, Any] = {
        number: signal.signal(number, requests.note)
        for number in heeded  # nohup's wish is respected
    }
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
