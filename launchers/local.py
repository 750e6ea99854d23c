"""Starts one process per device of this machine, through torchrun's process context."""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from llmtrain.errors import ConfigError
from llmtrain.schema import Part, unlearned

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import PContext

POLL_SECONDS = 0.2

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


class Ended(NamedTuple):
    """How the ranks ended: the exit code of each that failed, empty where all went well."""

    failures: dict[int, int]
    was_stopped: bool


@dataclass
class Local(Part):
    """This machine. ``grace_seconds`` is how long ranks may take to save after Ctrl+C."""

    kind: str = "local"
    starts_ranks: ClassVar[bool] = True
    grace_seconds: float = unlearned(600.0, above=0)

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
        ranks: int,
        threads: int,
        environment: dict[str, str],
        watch: Callable[[], None],
    ) -> Ended:
        """Run ``command`` in ``ranks`` processes to their end; ``watch`` is called meanwhile.

        The first rank that fails ends the others. Ctrl+C and SIGTERM ask the ranks to save and
        stop; a second Ctrl+C, or the end of the grace time, kills them.
        """
        with stop_requests() as requests:
            context = start(command, ranks, shared_environment(threads) | environment)
            try:
                return self.wait(context, requests, watch)
            finally:
                context.close(signal.SIGKILL)

    def wait(self, context: "PContext", requests: list[float], watch: Callable[[], None]) -> Ended:
        """Poll the ranks, show what they do, and hand on requests to stop."""
        num_passed_on = 0
        while True:
            result = context.wait(timeout=POLL_SECONDS, period=POLL_SECONDS)
            watch()
            if result is not None:
                codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
                return Ended(codes, bool(requests))
            if requests and num_passed_on == 0:
                signal_ranks(context, signal.SIGUSR2)
                num_passed_on = 1
            if len(requests) > 1 or (requests and time.time() - requests[0] > self.grace_seconds):
                signal_ranks(context, signal.SIGKILL)


def start(command: list[str], ranks: int, environment: dict[str, str]) -> "PContext":
    """One process for each rank, with its place in the environment."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it shorter
    # torch would raise on SIGHUP too, and so end a run that was started with nohup.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""
    places = {rank: {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)}
    common = environment | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return start_processes(
        name="rank",
        entrypoint=command[0],
        args={rank: tuple(command[1:]) for rank in range(ranks)},
        envs={rank: common | place for rank, place in places.items()},
        logs_specs=DefaultLogsSpecs(),
    )


def shared_environment(threads: int) -> dict[str, str]:
    """What every rank is told: where to meet, how many threads to use, whose child it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return (
        KEEP_MEMORY
        | KEEP_FEW_KERNELS
        | SPIN_BRIEFLY
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads),
            "LLMTRAIN_PARENT": str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).resolve().parent.parent), *python_path()]
            ),
        }
    )


def python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def signal_ranks(context: "PContext", number: signal.Signals) -> None:
    """Send a signal to every rank that still lives."""
    for pid in context.pids().values():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


@contextmanager
def stop_requests() -> Iterator[list[float]]:
    """The times at which Ctrl+C, SIGTERM or a lost terminal came, not an exception in mid-air."""
    requests: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(time.time())
        again = " Once more to stop without saving." if sys.stderr.isatty() else ""
        with suppress(OSError):  # the terminal may be what was lost
            print(f"\nStopping after this step, with a checkpoint.{again}", file=sys.stderr)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous: dict[signal.Signals, Any] = {
        number: signal.signal(number, note)
        for number in heeded  # nohup's wish is respected
    }
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
