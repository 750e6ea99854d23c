"""How fast devices multiply and copy, and how fast ranks exchange."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from launchers.group import RankGroup
from launchers.local import shared_environment
from llmtrain.doctor.ask import NoAnswer, reason
from llmtrain.doctor.line import Line, green, red, yellow
from llmtrain.hardware import Gpu, known_peak, num_cores

MOST_SECONDS = 90.0
SLOW_SHARE = 1 / 3  # of the datasheet's peak: below, a card is shared, hot or capped
UNEVEN = 0.85  # of the fastest card
NO_PEER_TO_PEER = {"NCCL_P2P_DISABLE": "1"}


def on_ranks(
    what: str, device: str, num_ranks: int, environment: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """What each rank measured. Raises NoAnswer for the first that failed, or when all hang."""
    places = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    places |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    shared = shared_environment(max(1, num_cores() // num_ranks)) | places | (environment or {})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "-m", "llmtrain.doctor.rank", what, folder, device]
        with RankGroup(command, num_ranks, shared) as group:
            group.wait_until(lambda: not group.is_whole, MOST_SECONDS)
        for rank, code in group.failures.items():
            log = Path(folder) / f"{rank}.log"
            said = log.read_text() if log.exists() else ""
            raise NoAnswer(f"rank {rank}: {reason(code, said)}")
        if group.living:
            raise NoAnswer(f"no answer in {MOST_SECONDS:.0f} s")
        paths = [Path(folder) / f"{rank}.json" for rank in range(num_ranks)]
        return [json.loads(path.read_text()) for path in paths]


def matmul(found: list[dict[str, Any]], gpus: list[Gpu]) -> Line:
    """TFLOP/s by dtype of the slowest device, beside its datasheet and its neighbours."""
    slowest = {name: min(one["tflops"][name] for one in found) for name in found[0]["tflops"]}
    what = ", ".join(f"{name} {value:.3g}" for name, value in slowest.items()) + " TFLOP/s"
    what += f" on each of {len(found)} GPUs" if len(gpus) > 1 else ""
    if not gpus:
        return green("matmul", found=what)
    rates = [one["tflops"]["fp16"] for one in found]
    behind = [gpu for gpu, rate in zip(gpus, rates, strict=True) if rate < UNEVEN * max(rates)]
    if behind:
        numbers = ", ".join(gpu.number for gpu in behind)
        remedy = "see nvidia-smi -q -d TEMPERATURE,PERFORMANCE: it is hot, capped or shared"
        return yellow("matmul", found=f"{what}; GPU {numbers} is slower than others", remedy=remedy)
    return beside_peak(what, slowest["fp16"], gpus)


def beside_peak(what: str, fp16_tflops: float, gpus: list[Gpu]) -> Line:
    """The rate as a share of the datasheet's, where there is one."""
    peak = known_peak(gpus[0].name)["fp16"]
    if peak is None:
        return green("matmul", found=what)
    what += f"; fp16 is {fp16_tflops / peak:.0%} of the datasheet's {peak:g}"
    if fp16_tflops < SLOW_SHARE * peak:
        remedy = "see nvidia-smi -q -d TEMPERATURE,PERFORMANCE,POWER and what else runs on it"
        return yellow("matmul", found=what, remedy=remedy)
    return green("matmul", found=what)


def bandwidth(found: list[dict[str, Any]], device: str) -> Line:
    slowest = min(one["copy_gbps"] for one in found)
    whose = "the GPU's memory" if device == "cuda" else "host memory, all cores"
    return green("bandwidth", found=f"{slowest:,.0f} GB/s, a copy in {whose}")


def reduction(device: str, num_ranks: int) -> Line:
    """The all-reduce of all ranks; where GPUs fail at it directly, by way of the host."""
    try:
        return reduction_line(on_ranks("reduce", device, num_ranks), device)
    except NoAnswer as problem:
        if device == "cpu":
            return unconnected(str(problem))
        return around(str(problem), num_ranks)


def around(problem: str, num_ranks: int) -> Line:
    """The same without direct copies between GPUs, which some boards promise and do not carry."""
    try:
        found = on_ranks("reduce", "cuda", num_ranks, NO_PEER_TO_PEER)
    except NoAnswer:
        return unconnected(problem)
    setting = "export NCCL_P2P_DISABLE=1"
    what = f"{slowest_gbps(found):,.1f} GB/s, but only by way of the host: {problem}"
    return yellow("all-reduce", found=what, remedy=setting, setting=setting)


def unconnected(problem: str) -> Line:
    remedy = "say export NCCL_DEBUG=INFO and try again; see the lines on NCCL and shared memory"
    return red("all-reduce", found=f"ranks do not reach each other: {problem}", remedy=remedy)


def reduction_line(found: list[dict[str, Any]], device: str) -> Line:
    if not all(one["is_right"] for one in found):
        what = "ranks reach each other and their sums are wrong"
        return red("all-reduce", found=what, remedy="try export NCCL_P2P_DISABLE=1")
    by = "NCCL" if device == "cuda" else "gloo"
    ranks = f"{len(found)} {'GPUs' if device == 'cuda' else 'processes'}, {by}"
    return green("all-reduce", found=f"{slowest_gbps(found):,.1f} GB/s between {ranks}")


def slowest_gbps(found: list[dict[str, Any]]) -> float:
    return float(min(one["gbps"] for one in found))
