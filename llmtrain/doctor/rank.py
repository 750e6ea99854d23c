"""What one rank measures of its device, or together with its peers.

`python -m llmtrain.doctor.rank speed|reduce FOLDER cpu|cuda`, started by the launcher's function.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.doctor.answer import DTYPES as TORCH_NAMES
from llmtrain.folder import write_json
from llmtrain.ranks import Ranks, die_with_parent
from llmtrain.train import redirect_output

if TYPE_CHECKING:
    import torch

DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")}  # that training may take
SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far more than any cache holds
REDUCED_BYTES = {"cpu": 2**26, "cuda": 2**28}
MEASURED_SECONDS = 0.3
REPEATS = 5


def main(what: str, folder: str, device: str) -> None:
    die_with_parent()
    ranks = Ranks.from_environment()
    redirect_output(Path(folder) / f"{ranks.rank}.log")
    import torch

    place = torch.device("cpu") if device == "cpu" else torch.device("cuda", ranks.local_rank)
    if device == "cuda":
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")  # as training does
    found = reduce(place, ranks) if what == "reduce" else speed(place)
    write_json(Path(folder) / f"{ranks.rank}.json", found)


def speed(device: "torch.device") -> dict[str, Any]:
    """TFLOP/s of a matrix product by dtype, and GB/s of a copy, read and written."""
    return {
        "tflops": {name: matmul_tflops(device, name) for name in DTYPES[device.type]},
        "copy_gbps": copy_gbps(device),
    }


def matmul_tflops(device: "torch.device", name: str) -> float:
    import torch

    size = SIZE[device.type]
    left = torch.randn(size, size, device=device).to(getattr(torch, TORCH_NAMES[name]))
    return 2 * size**3 / seconds("left @ left", left=left) / 1e12


def copy_gbps(device: "torch.device") -> float:
    import torch

    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds("target.copy_(source)", source=source, target=target) / 1e9


def seconds(statement: str, **names: Any) -> float:
    """The median time of a statement: torch's timer waits for a GPU and warms up."""
    import torch
    from torch.utils.benchmark import Timer

    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=MEASURED_SECONDS).median)


def reduce(device: "torch.device", ranks: Ranks) -> dict[str, Any]:
    """GB/s of an all-reduce between all ranks, and whether the sums are right.

    Bus bandwidth, 2 (n - 1) / n bytes over the slowest link for each byte that is reduced, as
    nccl-tests reports it (doc/PERFORMANCE.md there).
    """
    import torch
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    values = torch.ones(REDUCED_BYTES[device.type] // 4, device=device)
    dist.all_reduce(values)
    is_right = bool((values == ranks.world_size).all())
    took = min(reduce_seconds(values) for _ in range(REPEATS))
    dist.destroy_process_group()
    share = 2 * (ranks.world_size - 1) / ranks.world_size
    return {"gbps": share * values.numel() * 4 / took / 1e9, "is_right": is_right}


def reduce_seconds(values: "torch.Tensor") -> float:
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(values)
    values[0].item()  # waits for a GPU
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
