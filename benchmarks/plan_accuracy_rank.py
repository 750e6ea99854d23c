"""One rank of benchmarks.plan_accuracy: `python -m benchmarks.plan_accuracy_rank RUN_FOLDER`.

It trains some steps as `llmtrain.train` does, and one more under a count of every live tensor.
Leaves measured_<rank>.json in the run folder.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from llmtrain import starting, train
from llmtrain.evaluation import take_sample
from llmtrain.folder import RunFolder, write_json
from llmtrain.live import LiveTensors
from llmtrain.rank_run import Run
from llmtrain.ranks import Ranks
from llmtrain.records import peak_memory_gib
from llmtrain.step import train_step

GIB = 2**30
WARM_UP = 2  # steps whose time does not count
FEWEST, MOST = 3, 10  # steps whose time does
ENOUGH_SECONDS = 4.0


def measure(folder: RunFolder, ranks: Ranks) -> None:
    """Train and leave what was seen; in place of :func:`llmtrain.train.train`."""
    run = starting.start(folder, ranks)
    peaks = {"built": peak_memory_gib(run)}
    take_sample(run)
    peaks["sampled"] = peak_memory_gib(run)
    run.engine.module.train()
    seconds = timed_steps(run)
    peaks["trained"] = peak_memory_gib(run)
    found = {
        "step_seconds": median(seconds[WARM_UP:]),
        "all_step_seconds": seconds,
        "memory_gib": peaks,
        "live_gib": {name: num / GIB for name, num in live_bytes(run).items()},
    }
    write_json(result_of(folder, ranks.rank), found)


def result_of(folder: RunFolder, rank: int) -> Path:
    return folder.path / f"measured_{rank}.json"


def timed_steps(run: Run) -> list[float]:
    """Seconds of each step, in the mean over ranks; all ranks stop after the same one."""
    seconds: list[float] = []
    while len(seconds) < WARM_UP + FEWEST or (
        len(seconds) < WARM_UP + MOST and sum(seconds[WARM_UP:]) < ENOUGH_SECONDS
    ):
        start = time.perf_counter()
        one_step(run)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(run.sum(time.perf_counter() - start) / run.ranks.world_size)
    return seconds


def one_step(run: Run) -> None:
    train_step(run)
    run.step += 1


def live_bytes(run: Run) -> dict[str, int]:
    """Bytes of live tensors: between steps, at the peak of each of a step's phases, and of all."""
    account = Phases(run.device.type, run.plan.has_wide_products)
    for tensor in living_tensors():
        account.add(tensor)
    at_rest = account.live_bytes
    with account, account.watching(run.engine):
        one_step(run)
    return {"between": at_rest, **account.peaks, "peak": account.peak_bytes}


def living_tensors() -> list[torch.Tensor]:
    """Every tensor that Python knows, and its gradient."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return found + [each.grad for each in found if each.is_leaf and each.grad is not None]


class Phases(LiveTensors):
    """The peaks on a device in the engine's forward, backward and step, and beside them."""

    def __init__(self, device: str, has_wide_products: bool) -> None:
        super().__init__(has_wide_products)
        self.device = device
        self.phase = "beside"
        self.peaks: dict[str, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == self.device:
            super().add(tensor)

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        super().note(func, args, kwargs, out)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live_bytes)

    @contextmanager
    def watching(self, engine: Any) -> Iterator[None]:
        """Know which of an engine's calls is under way."""
        names = ("forward", "backward", "step")
        calls: dict[str, Any] = {name: self.during(name, getattr(engine, name)) for name in names}
        with patch.multiple(engine, **calls):
            yield

    def during(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.phase = phase
            try:
                return call(*args, **kwargs)
            finally:
                self.phase = "beside"

        return noted


def main() -> None:
    with patch.object(train, "train", measure):  # all around it is as a rank of ours has it
        train.main(sys.argv[1])


if __name__ == "__main__":
    main()
