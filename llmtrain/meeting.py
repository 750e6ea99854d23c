"""Ranks meet: each says that it is there, and those that do not come are named."""

import os
import socket
import time
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

from llmtrain.errors import TrainingError
from llmtrain.plan import Plan
from llmtrain.ranks import Ranks
from llmtrain.throughput import measure_matmul_tflops

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

COLLECTIVE_MINUTES = 30  # that an operation of all ranks may take; a hang is noticed before
POLL_SECONDS = 0.1
MOST_NAMED = 8
SLOW = 0.6  # of the median rate


def meet(ranks: Ranks, backend: str, seconds: float) -> None:
    """Join the process group at MASTER_ADDR and MASTER_PORT, unless this process is in one.

    Raises TrainingError naming the ranks that have not come after so many seconds, or the address
    where nobody answers.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        return
    store = store_of(ranks, seconds)
    wait_for_all(store, ranks, seconds)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=COLLECTIVE_MINUTES),
    )


def store_of(ranks: Ranks, seconds: float) -> "Store":
    """The first rank's table, by which all find each other."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            ranks.world_size,
            is_master=ranks.is_first,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        where = f"{host}:{port}"
        if ranks.is_first:
            said = str(error).splitlines()[0]
            raise TrainingError(f"The ranks cannot meet at {where}: {said}") from error
        reason = f"in {seconds:.0f} s, where the first machine's ranks should be"
        raise TrainingError(f"Nobody answers at {where} {reason}.") from error


def wait_for_all(store: "Store", ranks: Ranks, seconds: float) -> None:
    """Say that this rank is here, and wait until the others do."""
    store.set(sign_of(ranks.rank), socket.gethostname())
    signs = [sign_of(rank) for rank in range(ranks.world_size)]
    end = time.monotonic() + seconds
    while not store.check(signs):
        if time.monotonic() > end:
            raise TrainingError(absence(store, ranks, seconds))
        time.sleep(POLL_SECONDS)


def absence(store: "Store", ranks: Ranks, seconds: float) -> str:
    """Who is missing, and from which machines the others are, in one line."""
    here = [rank for rank in range(ranks.world_size) if store.check([sign_of(rank)])]
    missing = [str(rank) for rank in range(ranks.world_size) if rank not in here]
    hosts = sorted({store.get(sign_of(rank)).decode() for rank in here})
    more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
    named = f"{', '.join(missing[:MOST_NAMED])}{more}"
    which = f"Rank {named} has" if len(missing) == 1 else f"Ranks {named} have"
    return f"{which} not come in {seconds:.0f} s; those of {', '.join(hosts)} are here."


def slow_ranks(plan: Plan, control: Any) -> str | None:
    """One line that names the ranks which multiply much slower than most; None if there is none.

    All ranks take part. A throttled card or a busy machine holds all others up at every step.
    """
    import torch.distributed as dist

    rate = measure_matmul_tflops(plan.device, plan.dtype_name)
    found: list[Any] = [None] * plan.world_size
    dist.all_gather_object(found, (socket.gethostname(), rate), group=control)
    return slow_line(found)


def slow_line(rates: list[tuple[str, float]]) -> str | None:
    """The same, of the host and the rate of each rank."""
    most = median(rate for _, rate in rates)
    slow = [
        f"rank {rank} on {host} at {rate / most:.0%}"
        for rank, (host, rate) in enumerate(rates)
        if rate < SLOW * most
    ]
    more = f" and {len(slow) - MOST_NAMED} more" if len(slow) > MOST_NAMED else ""
    return f"slower than the median: {', '.join(slow[:MOST_NAMED])}{more}" if slow else None


def sign_of(rank: int) -> str:
    return f"here/{rank}"
