"""This machine in equal parts, one for each trial that runs at the same time."""

import os
from dataclasses import dataclass

from llmtrain.errors import ConfigError
from llmtrain.hardware import MEMORY_SHARE, Hardware, resolve, visible_gpus


@dataclass(frozen=True)
class Seat:
    """Cores and GPUs of one trial, which is one of ``num_seats``; no GPUs: all that there are."""

    num_seats: int
    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    def take(self) -> None:
        """Keep this process and those that it starts to the seat."""
        if self.num_seats == 1:
            return
        if self.cores:
            os.sched_setaffinity(0, self.cores)
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        os.environ[MEMORY_SHARE] = str(1 / self.num_seats)


def seats(num_seats: int, asked: Hardware) -> list[Seat]:
    """As many seats as trials run at a time. Raises ConfigError where GPUs do not suffice."""
    gpus = []
    if num_seats > 1 and resolve(asked).device == "cuda":
        gpus = [gpu.uuid for gpu in visible_gpus()]
    if gpus and num_seats > len(gpus):
        reason, remedy = f"is more than the {len(gpus)} GPUs", f"give {len(gpus)} or fewer"
        raise ConfigError("sweep.num_parallel", num_seats, reason, remedy)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [
        Seat(num_seats, share(cores, seat, num_seats), share(gpus, seat, num_seats))
        for seat in range(num_seats)
    ]


def share(things: list, seat: int, num_seats: int) -> tuple:
    """A seat's part: neighbours, equally many for all; one is shared where there are too few."""
    each = len(things) // num_seats
    if each == 0:
        return tuple(things[seat % len(things) :][:1]) if things else ()
    return tuple(things[seat * each : (seat + 1) * each])
