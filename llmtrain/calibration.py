"""Measures a machine's rates: `python -m llmtrain.calibration DEVICE PATH`, once for each rank.

All ranks measure at once, as they will work, because they share caches, memory and cores.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, pairwise
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.folder import write_json
from llmtrain.ranks import leave
from llmtrain.rates import LINES, VIEW_SHARE, Curve, Line, Rates, is_busy, num_blocks

if TYPE_CHECKING:
    import torch

    Make = Callable[..., torch.Tensor]

# By device: a GPU's are so large that the launch of a kernel is a small part of them.
SIZES = {  # values; from the third on in parallel
    "cpu": (2**10, 2**15 - 32, 2**15, 2**18, 2**20, 2**23),
    "cuda": (2**10, 2**15, 2**18, 2**20, 2**23, 2**25),
}
LARGEST = 2**20  # that a kind is measured at whose arithmetic takes longer than its bytes
MESSAGES = {"cpu": (2**10, 2**18, 2**21), "cuda": (2**10, 2**20, 2**25)}  # values
POOL_BYTES = {"cpu": 3e7, "cuda": 4e8}  # what is read was written long ago: no cache has it
ADAM_VALUES = 2**21
CHAIN_OPERATIONS = 17 + 12 * VIEW_SHARE  # operations and views of the chain of modules
PRODUCTS = {  # batch, M, K, N
    "cpu": [
        (1, 128, 64, 64),
        (1, 256, 256, 256),
        (1, 1024, 256, 256),
        (1, 1024, 256, 1024),
        (1, 512, 768, 768),
        (1, 1024, 256, 16),
        (1, 1024, 16, 256),
        (16, 256, 64, 256),
    ],
    "cuda": [
        (1, 1024, 1024, 1024),
        (1, 2048, 4096, 4096),
        (1, 8192, 1024, 4096),
        (1, 8192, 4096, 4096),
        (1, 8192, 4096, 64),
        (32, 1024, 128, 1024),
    ],
}
MATVECS = [(64, 1, 16, 512), (64, 1, 512, 16), (8, 1, 64, 64)]
# experts, rows, K, N
GROUPED = [(8, 512, 64, 64), (8, 2048, 256, 256), (4, 2048, 256, 512)]
HEADS = {  # batch, heads, length, width
    "cpu": [(2, 4, 128, 32), (2, 4, 256, 64), (2, 2, 256, 128), (1, 4, 512, 64)],
    "cuda": [(2, 16, 1024, 64), (1, 16, 2048, 128), (1, 16, 4096, 64)],
}
# batch, length, channels, states of a channel
SCANNED = [(1, 64, 64, 16), (2, 128, 256, 16), (4, 128, 512, 16)]
HEAD = 64  # channels of a head of Mamba-2
NUM_TENSORS = {"add": 3}  # that a sample reads and writes; else 2
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class Probe:
    """Calls of one kind and size, and the least seconds that one of them took."""

    key: str
    flops: float
    num_bytes: float
    calls: Sequence[Callable[[], Any]]
    seconds: float = inf

    def run(self, synchronise: Callable[[], None]) -> None:
        """Whatever else the machine does only adds to a time, so the least is the truest."""
        self.calls[0]()  # wakes the threads
        synchronise()
        start = time.perf_counter()
        kept = [call() for call in self.calls]  # so that each writes to memory of its own
        synchronise()
        self.seconds = min(self.seconds, (time.perf_counter() - start) / len(kept))


def measure(device: str, dtypes: list[str], budget_seconds: float = 2.5) -> Rates:
    """This process's rates, while others measure theirs; all probes in turn, again and again."""
    import torch

    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    end = time.perf_counter() + budget_seconds
    probes = [*probes_of_host(device), *(p for name in dtypes for p in probes_of(device, name))]
    for number in count():
        if number > 1 and time.perf_counter() > end:
            break
        for probe in probes:
            probe.run(synchronise)
    grouped: dict[str, list[Probe]] = {}
    for probe in probes:
        grouped.setdefault(probe.key, []).append(probe)
    lines = {key: fitted(group) for key, group in grouped.items() if key.split()[0] in LINES}
    curves = {key: curve(group) for key, group in grouped.items() if key not in lines}
    if device == "cuda":  # where all experts are one kernel
        lines |= {f"grouped {name}": (*lines[f"product {name}"][:2], 0.0) for name in dtypes}
    return Rates(host_seconds_of(curves, device), device == "cuda", lines, curves)


def host_seconds_of(curves: dict[str, Curve], device: str) -> float:
    """An operation's way to its kernel; on a CPU, which waits for it, less a small kernel."""
    seconds = curves.pop("host fp32")[0][1] / CHAIN_OPERATIONS
    return seconds if device == "cuda" else max(0.0, seconds - curves["add fp32"][0][1])


def probes_of_host(device: str) -> Iterator[Probe]:
    """A chain of small modules, there and back; and a step of fused AdamW."""
    import torch
    from torch import nn

    chain = nn.Sequential(*(nn.Linear(8, 8), nn.SiLU()) * 2).to(device)
    values = torch.rand(4, 8, device=device)
    yield Probe("host fp32", 0.0, 1.0, [lambda: chain(values).sum().backward()])
    weights = torch.rand(ADAM_VALUES, device=device)
    weights.grad = torch.rand_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=True)
    yield Probe("adam fp32", 0.0, 28.0 * ADAM_VALUES, [optimizer.step])
    for shape in SCANNED if device == "cpu" else ():
        yield from scan_probes(*shape)


def probes_of(device: str, name: str) -> Iterator[Probe]:
    """Every probe of a dtype."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[name])

    def make(*shape: int) -> "torch.Tensor":
        return torch.rand(shape, device=device).to(dtype)

    for size in SIZES[device]:
        yield from elementwise_probes(make, name, size, POOL_BYTES[device])
    for shape in PRODUCTS[device]:
        yield product_probe(make, f"product {name}", *shape)
    for shape in MATVECS:
        yield product_probe(make, f"matvec {name}", *shape)
    for shape in GROUPED if device == "cpu" else ():
        yield grouped_probe(make, name, *shape)
    for shape in HEADS[device]:
        yield from attention_probes(make, name, *shape)


def elementwise_probes(make: "Make", name: str, size: int, pool_bytes: float) -> Iterator[Probe]:
    first = make(size)
    number = max(2, min(32, int(pool_bytes / first.nbytes)))
    pool = [first, *(first.clone() for _ in range(number - 1))]
    for kind, sample in samples().items():
        if size <= LARGEST or kind in ("add", "clone"):
            calls = [partial(sample, x, y) for x, y in pairwise(pool)]
            num_tensors = NUM_TENSORS.get(kind, 2)
            yield Probe(f"{kind} {name}", 0.0, num_tensors * first.nbytes, calls[:8])


def samples() -> dict[str, "Callable[[torch.Tensor, torch.Tensor], Any]"]:
    """What is measured of each kind, of values [N]."""
    import torch

    return {
        "add": torch.add,
        "clone": lambda x, _: x.clone(),
        "transpose": lambda x, _: x.view(-1, 32).t().contiguous(),
        "silu": lambda x, _: torch.nn.functional.silu(x),
        "exp": lambda x, _: x.exp(),
        "softplus": lambda x, _: torch.nn.functional.softplus(x),
        "bernoulli": lambda x, _: torch.empty_like(x).bernoulli_(0.9),
    }


def product_probe(make: "Make", key: str, batch: int, m: int, k: int, n: int) -> Probe:
    """The three products of a linear layer: forward, and backward to inputs and to weights."""
    inputs, weights, grads = make(batch, m, k), make(batch, n, k), make(batch, m, n)
    num_bytes = inputs.nbytes + weights.nbytes + grads.nbytes
    pairs = [(inputs, weights.mT), (grads, weights), (grads.mT, inputs)]
    if batch == 1:
        pairs = [(left[0], right[0]) for left, right in pairs]
    calls = [partial(left.matmul, right) for left, right in pairs]
    return Probe(key, 2.0 * batch * m * k * n, num_bytes, calls)


def grouped_probe(make: "Make", name: str, experts: int, rows: int, k: int, n: int) -> Probe:
    """Rows dealt to experts, in other numbers at each call, so that no shape comes again."""
    import torch

    inputs, weights = make(rows, k), make(experts, k, n)

    def call() -> "torch.Tensor":
        ends = torch.randint(rows, (experts,)).sort().values
        ends[-1] = rows
        return torch._grouped_mm(inputs, weights, ends.to(inputs.device, torch.int32))

    return Probe(f"grouped {name}", 2.0 * rows * k * n, experts, [call])


def scan_probes(batch: int, length: int, channels: int, states: int) -> Iterator[Probe]:
    """The scans of Mamba-1 and Mamba-2, forward and backward."""
    import torch

    from llmtrain.kernel.mixers import OURS

    heads = channels // HEAD
    sizes = [(channels, length)] * 2 + [(states, length)] * 2
    inputs = [torch.rand(batch, *size, requires_grad=True) for size in sizes]
    inputs.insert(2, -torch.rand(channels, states))
    of_heads = [(length, heads, HEAD), (length, heads), (length, 1, states), (length, 1, states)]
    grouped = [torch.rand(batch, *size, requires_grad=True) for size in of_heads]
    grouped.insert(2, -torch.rand(heads))
    mamba_1, mamba_2 = (OURS[name](chunked_scan_of) for name in SCANS_OF_TRANSFORMERS)
    count = float(batch * channels * length * states)
    for kind, call in (
        ("scan", partial(mamba_1, *inputs)),
        ("heads", partial(mamba_2, *grouped, chunk_size=HEAD)),
    ):
        yield Probe(f"{kind} fp32", count, 0.0, [call])
        output = call()
        leaves = [tensor for tensor in call.args if tensor.requires_grad]
        given = torch.ones_like(output)
        backward = partial(torch.autograd.grad, output, leaves, given, retain_graph=True)
        yield Probe(f"{kind}_backward fp32", count, 0.0, [backward])


SCANS_OF_TRANSFORMERS = ("mamba_selective_scan", "mamba2_chunk_scan")


def chunked_scan_of(*inputs: Any, chunk_size: int, **_: Any) -> Any:
    """Mamba-2's scan where it is not compiled."""
    import torch

    from llmtrain.kernel.chunked_scan import chunked_scan

    hidden_states, dt, A, B, C = inputs
    zeros = torch.zeros_like(A)
    one_document = torch.zeros(hidden_states.shape[:2], dtype=torch.long)
    return chunked_scan(hidden_states, dt, A, B, C, chunk_size, zeros, zeros, one_document)


def attention_probes(make: "Make", name: str, *shape: int) -> Iterator[Probe]:
    """Fused attention, forward and backward."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    batch, heads, length, width = shape
    scores, blocks = float(batch * heads * length**2), batch * heads * num_blocks(length, length)
    query, key, value = (make(*shape) for _ in range(3))
    forward = partial(attend, query, key, value)
    yield Probe(f"attention {name}", 4 * scores * width, blocks, [forward])
    leaves = [values.clone().requires_grad_() for values in (query, key, value)]
    output = attend(leaves[0], leaves[1], leaves[2])
    backward = partial(torch.autograd.grad, output, leaves, output.detach(), retain_graph=True)
    yield Probe(f"attention_backward {name}", 10 * scores * width, blocks, [backward])


def curve(probes: list[Probe]) -> Curve:
    return [(probe.num_bytes, probe.seconds) for probe in probes]


def fitted(probes: list[Probe]) -> Line:
    """Seconds as a start and a slope in FLOPs and in bytes, none negative, by least squares.

    Errors count more the longer an operation takes, because seconds are added up.
    """
    import numpy as np

    sizes = np.array([(1.0, probe.flops, probe.num_bytes) for probe in probes])
    seconds = np.array([probe.seconds for probe in probes])
    scale = sizes.max(axis=0)
    used = [number for number in range(3) if scale[number] > 0]
    if probes[0].key.startswith(("attention", "grouped")):
        used.remove(0)  # of few and long calls a start would be noise
    rows = sizes / np.maximum(scale, 1e-9) / np.sqrt(seconds)[:, None]
    targets = np.sqrt(seconds)
    while True:
        found = np.linalg.lstsq(rows[:, used], targets, rcond=None)[0]
        if found.min() >= 0:
            break
        del used[int(found.argmin())]
    line = dict(zip(used, (found / scale[used]).tolist(), strict=True))
    return line.get(0, 0.0), line.get(1, 0.0), line.get(2, 0.0)


def measure_links(device: str) -> Line:
    """All-reduce between the ranks: seconds of a message, and of each of its bytes."""
    import torch
    import torch.distributed as dist

    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    probes = []
    for size in MESSAGES[device]:
        values = torch.zeros(size, device=device)
        probes.append(Probe("all_reduce", 0.0, values.nbytes, [partial(dist.all_reduce, values)]))
    for _ in range(3):
        for probe in probes:
            probe.run(synchronise)
    return fitted(probes)


def main(device: str, path: str) -> None:
    """Measure as one of the ranks; the first writes what it found."""
    import torch
    import torch.distributed as dist

    from llmtrain.kernel import compiled

    found_busy = is_busy()  # before this is at work itself
    compiled.cache_root = Path(path).parent.parent
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    names = ["fp32", "bf16"]
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_float32_matmul_precision("high")  # as ranks do
        names.append("fp16")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    dist.barrier()
    rates = measure(device, names)
    if world_size > 1:
        rates.lines["all_reduce fp32"] = measure_links(device)
    if rank == 0:
        write_json(Path(path), {"was_busy": found_busy, "rates": asdict(rates)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
