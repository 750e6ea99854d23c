"""What one rank of a machine attains: seconds of an operation by its kind, dtype and size."""

import hashlib
import json
import os
import subprocess
import sys
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import count, pairwise
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.local import shared_environment
from llmtrain.folder import write_json
from llmtrain.hardware import Machine, num_cores

if TYPE_CHECKING:
    import torch

    Make = Callable[..., torch.Tensor]

GB, TERA = 1e9, 1e12
LONGEST_SECONDS = 120.0  # that measuring may take on a machine with much else to do
RATES_FORMAT = 1  # raise it when what is measured changes, so that older caches are not read
# Operations that cost like the one that is measured; all others cost like an addition.
LIKE = {  # without leading and trailing underscores
    "clone": "cat stack copy to_copy zeros zeros_like new_zeros fill zero constant_pad_nd"
    " slice_backward select_backward index index_select gather embedding flip roll repeat split",
    "silu": "silu_backward sigmoid exp2 rsqrt sqrt log log2 where tril triu masked_fill"
    " softplus_backward softmax_backward_data log_softmax_backward_data",
    "exp": "expm1 softmax log_softmax safe_softmax logsumexp cumsum cummax scatter scatter_add",
    "softplus": "tanh gelu gelu_backward log1p erf sin cos log_sigmoid_forward index_put index_add"
    " convolution convolution_backward",
    "bernoulli": "native_dropout rand_like rand randn uniform normal multinomial sort topk",
}
KINDS = {name: kind for kind, names in LIKE.items() for name in [kind, *names.split()]}
DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}

CPU_BLOCK = 512  # keys of a block of scores
VIEW_SHARE = 0.4  # of an operation's way to its kernel that a view takes
LINES = ("product", "matvec", "attention", "attention_backward", "all_reduce")
ELEMENTWISE = ("add", "clone", "transpose", "silu", "exp", "softplus", "bernoulli", "adam")
Curve = list[tuple[float, float]]  # bytes and seconds, by bytes
Line = tuple[float, float, float]  # seconds; and more for each FLOP and each byte


def dtype_key(dtype: Any) -> str:
    """``bf16``, ``fp16``, or ``fp32`` for every other."""
    return DTYPES.get(str(dtype), "fp32")


@dataclass(frozen=True)
class Rates:
    """One rank's rates while all ranks of its machine work.

    ``lines`` and ``curves`` are by kind and dtype; ``host_seconds`` is an operation's way through
    Python, autograd and dispatch, which a GPU (``is_asynchronous``) does not wait for.
    """

    host_seconds: float
    is_asynchronous: bool
    lines: dict[str, Line]
    curves: dict[str, Curve]

    def seconds(self, kind: str, dtype: str, flops: float, num_bytes: float) -> float:
        """Of one operation, without the host's way to it; as in fp32 where a dtype is not known."""
        for key in (f"{kind} {dtype}", f"{kind} fp32"):
            if key in self.lines:
                start, per_flop, per_byte = self.lines[key]
                return start + per_flop * flops + per_byte * num_bytes
            if key in self.curves:
                return interpolated(self.curves[key], num_bytes)
        raise KeyError(kind)

    def moving(self, kind: str, num_bytes: float) -> float:
        """Seconds to move so many bytes: ``clone``, ``all_reduce``, ``host_link``, ``nvme``."""
        return self.seconds(kind, "fp32", 0.0, num_bytes) if num_bytes else 0.0


def interpolated(curve: Curve, size: float) -> float:
    """Straight lines between the measured points; beyond the last in proportion."""
    number = bisect([point[0] for point in curve], size)
    if number == len(curve):
        return curve[-1][1] * size / curve[-1][0]
    low, high = curve[number - 1] if number else (0.0, curve[0][1]), curve[number]
    return low[1] + (high[1] - low[1]) * (size - low[0]) / (high[0] - low[0])


def rates_of(machine: Machine, cache: Path) -> Rates | None:
    """Measured where the machine is this one, else from its datasheet; None where none is known."""
    return calibrated(machine, cache) if machine.is_here else datasheet(machine)


# Of datasheet figures, what training attains: assumed with care, not measured, except where said.
# Large products come to about three quarters of the dense peak; the slope below adds their traffic.
# FlashAttention-2 reaches 50 to 73 % of an A100's peak (Dao 2023), in the backward pass less.
PRODUCT_SHARE, ATTENTION_SHARE, ATTENTION_BACKWARD_SHARE = 0.75, 0.55, 0.45
BANDWIDTH_SHARE = 0.85  # of memory, in copies longer than a launch
LINK_SHARE = 0.8  # of NVLink or PCIe, in messages of some MB
LAUNCH_SECONDS = 6e-6  # the host's part of an eager operation
KERNEL_SECONDS = 2e-6  # a kernel that does nothing
MESSAGE_SECONDS = 2e-5  # a collective of nothing
NODE_LINK = 25.0  # GB/s: a 200 Gb/s network card for each node
PCIE_LINK = 15.75  # GB/s: PCIe 3.0 x16, where a card's link is not known
HOST_ADAM = 56 * GB  # bytes/s through a host's AdamW: a rented server's share of memory channels
NVME_LINK = 3.0  # GB/s: one PCIe 3.0 x4 drive


def datasheet(machine: Machine) -> Rates | None:
    """A GPU's rates from its datasheet; None where its peaks or bandwidth are not known."""
    if machine.device == "cpu" or machine.memory_bandwidth is None:
        return None
    per_byte = 1 / (BANDWIDTH_SHARE * machine.memory_bandwidth * GB)
    lines = links(machine)
    for name, peak in machine.peak_tflops.items():
        moved = (KERNEL_SECONDS, 0.0, per_byte)
        lines |= {f"{kind} {name}": moved for kind in ("matvec", *ELEMENTWISE)}
        if peak:
            lines |= product_lines(name, peak * TERA, per_byte)
    return Rates(LAUNCH_SECONDS, True, lines, {}) if any(machine.peak_tflops.values()) else None


def product_lines(dtype: str, peak: float, per_byte: float) -> dict[str, Line]:
    """Products and fused attention, whose scores never reach memory; ``peak`` in FLOP/s."""
    return {
        f"product {dtype}": (KERNEL_SECONDS, 1 / (PRODUCT_SHARE * peak), per_byte),
        f"attention {dtype}": (KERNEL_SECONDS, 1 / (ATTENTION_SHARE * peak), 0.0),
        f"attention_backward {dtype}": (
            KERNEL_SECONDS,
            1 / (ATTENTION_BACKWARD_SHARE * peak),
            0.0,
        ),
    }


def links(machine: Machine) -> dict[str, Line]:
    """What moves between ranks, to the host and to disk, by datasheet."""
    link = (machine.link_bandwidth or PCIE_LINK) * LINK_SHARE
    if machine.num_nodes > 1:
        link = min(link, NODE_LINK)
    host = (machine.host_link_bandwidth or PCIE_LINK) * LINK_SHARE
    ring = 2 * (machine.world_size - 1) / machine.world_size  # Patarasuk and Yuan 2009
    return {
        "all_reduce fp32": (MESSAGE_SECONDS, 0.0, ring / (link * GB)),
        "host_link fp32": (0.0, 0.0, 1 / (host * GB)),
        "nvme fp32": (0.0, 0.0, machine.gpus_per_node / (NVME_LINK * GB)),
        "host_adam fp32": (0.0, 0.0, machine.gpus_per_node / HOST_ADAM),
    }


def calibrated(machine: Machine, cache: Path) -> Rates:
    """This machine's rates, measured once in 3 s by as many processes as there are ranks.

    They run as ranks do, in the same environment and all at once, because they share caches,
    memory and cores.
    """
    threads = max(1, machine.num_cores // machine.gpus_per_node)
    what = [RATES_FORMAT, machine.device_name, machine.gpus_per_node, threads, version("torch")]
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    path = cache / "rates" / f"{name}.json"
    if not path.exists() or (was_busy(path) and not is_busy()):
        run_ranks(machine, threads, path)
    found = Rates(**json.loads(path.read_text())["rates"])
    return replace(found, lines=links(machine) | found.lines)


def was_busy(path: Path) -> bool:
    """Whether others were at work on this machine when its rates were measured."""
    return bool(json.loads(path.read_text())["was_busy"])


def is_busy() -> bool:
    return os.getloadavg()[0] > num_cores() / 2


def run_ranks(machine: Machine, threads: int, path: Path) -> None:
    """Measure in one process a rank; the first writes ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks = machine.gpus_per_node
    common = os.environ | shared_environment(threads) | {"WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "llmtrain.rates", machine.device, str(path)]
    processes = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=LONGEST_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # one that waits for another that failed
    if any(process.returncode for process in processes):
        raise RuntimeError(b"".join(errors).decode())


def num_blocks(length: int, num_keys: float) -> float:
    """Into how many blocks of scores torch's fused attention on a CPU divides a head.

    Each has a price of its own, above all in 16 bits (torch's FlashAttentionKernel.cpp).
    """
    queries = 256 if length >= 768 else 64 if length >= 192 else 32
    return ceil(length / queries) * max(1.0, num_keys / CPU_BLOCK)


# What follows is measured in processes of its own, as many as there are ranks.

SIZES = (2**10, 2**15 - 32, 2**15, 2**18, 2**20, 2**23)  # values; from the third on in parallel
LARGEST = 2**20  # that a kind is measured at whose arithmetic takes longer than its bytes
MESSAGES = (2**10, 2**18, 2**21)  # values
POOL_BYTES = 3e7  # what an operation reads was written many operations ago: no core has it in cache
ADAM_VALUES = 2**21
CHAIN_OPERATIONS = 17 + 12 * VIEW_SHARE  # operations and views of the chain of modules
PRODUCTS = [  # batch, M, K, N
    (1, 128, 64, 64),
    (1, 256, 256, 256),
    (1, 1024, 256, 256),
    (1, 1024, 256, 1024),
    (1, 512, 768, 768),
    (1, 1024, 256, 16),
    (1, 1024, 16, 256),
    (16, 256, 64, 256),
]
MATVECS = [(64, 1, 16, 512), (64, 1, 512, 16), (8, 1, 64, 64)]
# batch, heads, length, width
HEADS = [(2, 4, 128, 32), (2, 4, 256, 64), (2, 2, 256, 128), (1, 4, 512, 64)]
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


def probes_of(device: str, name: str) -> Iterator[Probe]:
    """Every probe of a dtype."""
    import torch

    dtype = getattr(torch, TORCH_NAMES[name])

    def make(*shape: int) -> "torch.Tensor":
        return torch.rand(shape, device=device).to(dtype)

    yield from elementwise_probes(make, name)
    for shape in PRODUCTS:
        yield product_probe(make, f"product {name}", *shape)
    for shape in MATVECS:
        yield product_probe(make, f"matvec {name}", *shape)
    for shape in HEADS:
        yield from attention_probes(make, name, *shape)


def elementwise_probes(make: "Make", name: str) -> Iterator[Probe]:
    for size in SIZES:
        first = make(size)
        number = max(2, min(32, int(POOL_BYTES / first.nbytes)))
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
    if probes[0].key.startswith("attention"):
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
    for size in MESSAGES:
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

    found_busy = is_busy()  # before this is at work itself
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
