"""What one rank of a machine attains: seconds of an operation by its kind, dtype and size."""

import hashlib
import json
import os
import subprocess
import sys
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launchers import blocks
from launchers.local import shared_environment
from llmtrain.compiler import compiler
from llmtrain.folder import read_cached
from llmtrain.hardware import Machine, num_cores

if TYPE_CHECKING:
    import torch

    Make = Callable[..., torch.Tensor]

GB, TERA = 1e9, 1e12
LONGEST_SECONDS = 120.0  # that measuring may take on a machine with much else to do
RATES_FORMAT = 5  # raise it when what is measured changes, so that older caches are not read
# Operations that cost like the one that is measured; all others cost like an addition.
LIKE = {  # without leading and trailing underscores
    "clone": "cat stack copy to_copy zeros zeros_like new_zeros fill zero constant_pad_nd"
    " slice_backward select_backward index index_select gather embedding flip roll repeat split",
    "silu": "silu_backward sigmoid exp2 rsqrt sqrt log log2 where tril triu masked_fill"
    " softplus_backward softmax_backward_data log_softmax_backward_data"
    " compiled_convolution compiled_convolution_backward",
    "exp": "expm1 softmax log_softmax safe_softmax logsumexp cumsum cummax scatter scatter_add"
    " compiled_cross_entropy",
    "softplus": "tanh gelu gelu_backward log1p erf sin cos log_sigmoid_forward index_put index_add"
    " convolution convolution_backward",
    "bernoulli": "native_dropout rand_like rand randn uniform normal multinomial sort topk",
}
KINDS = {name: kind for kind, names in LIKE.items() for name in [kind, *names.split()]}
DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}

CPU_BLOCK = 512  # keys of a block of scores
VIEW_SHARE = 0.4  # of an operation's way to its kernel that a view takes
SCANS = ("scan", "scan_backward", "heads", "heads_backward")  # by the states that they walk
LINES = ("product", "grouped", "matvec", "attention", "attention_backward", "all_reduce", *SCANS)
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
    """A GPU's from its datasheet, else measured where it is here; None where nothing is known.

    A known card's figures go first: what measures one has not been tried on any GPU.
    """
    known = datasheet(machine)
    if known is not None or not machine.is_here:
        return known
    try:
        return calibrated(machine, cache)
    # A GPU that is full or not torch's to use, a cache that cannot be written to.
    except (RuntimeError, subprocess.TimeoutExpired, OSError):
        return None


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
        f"grouped {dtype}": (KERNEL_SECONDS, 1 / (PRODUCT_SHARE * peak), 0.0),
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
    what.append(compiler() is not None)  # of which kernels are
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    path = cache / "rates" / f"{name}.json"
    known = read_cached(path, Measured.from_json)
    if known is None or (known.was_busy and not is_busy()):
        run_ranks(machine, shared_environment(threads) | blocks.preloaded(cache), path)
        known = read_cached(path, Measured.from_json)
    if known is None:
        raise RuntimeError(f"{path} was not written")
    return replace(known.rates, lines=links(machine) | known.rates.lines)


class Measured(NamedTuple):
    """Rates, and whether others were at work on this machine when they were measured."""

    rates: Rates
    was_busy: bool

    @classmethod
    def from_json(cls, values: Any) -> "Measured":
        return cls(Rates(**values["rates"]), bool(values["was_busy"]))


def is_busy() -> bool:
    return os.getloadavg()[0] > num_cores() / 2


def run_ranks(machine: Machine, environment: dict[str, str], path: Path) -> None:
    """Measure in one process a rank; the first writes ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ranks = machine.gpus_per_node
    common = os.environ | environment | {"WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "llmtrain.calibration", machine.device, str(path)]
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
