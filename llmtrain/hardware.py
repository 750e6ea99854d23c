"""The machine that a run is planned for, as a preset states it or as this machine answers."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llmtrain.errors import ConfigError
from llmtrain.schema import unlearned

CARDS = Path(__file__).resolve().parent.parent / "conf" / "hardware" / "card"
GIB = 2**30
MIG_LINE = re.compile(
    r"\s+MIG ((?:\d+c\.)?\d+g\.(\d+)gb\S*)\s+Device\s+(\d+): \(UUID: (MIG-[^)]+)\)"
)
MIG_SHARE = 0.83  # GiB of a slice for each GB in its name, at least: from 0.83 to 0.98
MEMORY_SHARE = "LLMTRAIN_MEMORY_SHARE"  # of a process that shares this machine with its likes
FIGURES = (
    "memory_bandwidth",
    "link_bandwidth",
    "host_link_bandwidth",
    "power_watts",
    "price_per_hour",
)
# Words of a card's name that change nothing of its peak; any other ("Laptop", "D", "Ti") may.
PLAIN_WORDS = {"NVIDIA", "GeForce", "Tesla", "SXM2", "SXM3", "SXM4", "SXM5", "PCIE", "PCIe"}
PLAIN_WORDS |= {"HBM2e", "HBM3", "HBM3e"}
PLAIN_WORDS |= {"16GB", "24GB", "32GB", "40GB", "80GB", "141GB"}


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class PeakTflops:
    """Dense matmul peak of one device by dtype, in TFLOP/s, from its datasheet; null: unknown."""

    fp32: float | None = unlearned(above=0)
    fp16: float | None = unlearned(above=0)
    bf16: float | None = unlearned(above=0)


@dataclass
class Hardware:
    """One node's devices, how many nodes there are, and their datasheet figures.

    ``auto`` and null mean: what this machine has. Bandwidths are in GB/s and in one direction.
    ``product`` is the word by which nvidia-smi's name of the card is recognised. ``power_watts`` is
    one device's at full load and ``price_per_hour`` what an hour of one device costs, its share of
    the machine included, in whatever currency.
    """

    name: str = unlearned("auto")
    product: str | None = unlearned()
    device: Device = unlearned(Device.auto)
    gpus_per_node: int | None = unlearned(low=1)
    num_nodes: int = unlearned(1, low=1)
    memory_gib: float | None = unlearned(above=0)
    host_memory_gib: float | None = unlearned(above=0)
    memory_bandwidth: float | None = unlearned(above=0)
    link_bandwidth: float | None = unlearned(above=0)
    host_link_bandwidth: float | None = unlearned(above=0)
    power_watts: float | None = unlearned(above=0)
    price_per_hour: float | None = unlearned(low=0)
    peak_tflops: PeakTflops = field(default_factory=PeakTflops)


class Gpu(NamedTuple):
    """One visible GPU as nvidia-smi describes it."""

    number: str
    uuid: str
    name: str
    memory_gib: float
    compute_capability: float


@dataclass(frozen=True)
class Machine:
    """What a run is planned for: every figure that is known of it. Null: not known.

    ``is_here`` tells this machine from one that only a preset describes.
    """

    name: str
    device: str
    device_name: str
    gpus_per_node: int
    num_nodes: int
    memory_gib: float
    host_memory_gib: float
    peak_tflops: dict[str, float | None]
    has_bf16: bool
    num_cores: int
    is_here: bool
    memory_bandwidth: float | None
    link_bandwidth: float | None
    host_link_bandwidth: float | None
    power_watts: float | None
    price_per_hour: float | None

    @property
    def world_size(self) -> int:
        return self.gpus_per_node * self.num_nodes


def resolve(asked: Hardware) -> Machine:
    """The machine that a config asks for, completed with what this machine answers.

    Raises ConfigError where ``device=cuda`` is asked of ``auto`` and no GPU is seen.
    """
    is_preset = asked.device == Device.cuda and asked.memory_gib is not None
    gpus = [] if is_preset or asked.device == Device.cpu else visible_gpus()
    if asked.device == Device.cuda and not is_preset and not gpus:
        raise ConfigError("hardware.device", "cuda", "finds no GPU here", "see nvidia-smi")
    return gpu_machine(asked, gpus) if gpus or is_preset else cpu_machine(asked)


def gpu_machine(asked: Hardware, gpus: list[Gpu]) -> Machine:
    """A machine with GPUs: a preset's figures, else those of the visible cards."""
    peak = vars(asked.peak_tflops)
    name = asked.product or (gpus[0].name if gpus else asked.name)
    if gpus and not any(peak.values()):
        peak = known_peak(gpus[0].name)
    has_bf16 = min(gpu.compute_capability for gpu in gpus) >= 8.0 if gpus else bool(peak["bf16"])
    return Machine(
        name=asked.name,
        device="cuda",
        device_name=name,
        gpus_per_node=asked.gpus_per_node or len(gpus) or 1,
        num_nodes=asked.num_nodes,
        memory_gib=asked.memory_gib or min(map(usable_gib, gpus)),
        host_memory_gib=asked.host_memory_gib or host_memory_gib(),
        peak_tflops=peak,
        has_bf16=has_bf16,
        num_cores=num_cores(),
        is_here=bool(gpus),
        **figures(asked, known_card(name) if gpus else {}),
    )


RANKS_PER_CORE = 4  # that a machine may be asked to run


def cpu_machine(asked: Hardware) -> Machine:
    """A machine without GPUs: each rank is a process that shares cores and memory."""
    ranks = asked.gpus_per_node or 1
    if asked.product is not None:
        reason, remedy = f"is not what {asked.name} has", "take hardware=cpux1"
        raise ConfigError("hardware.device", "cpu", reason, remedy)
    if ranks > RANKS_PER_CORE * num_cores():
        reason = f"processes are too many for {num_cores()} cores"
        raise ConfigError("hardware.gpus_per_node", ranks, reason, f"give {num_cores()} or fewer")
    memory = asked.host_memory_gib or host_memory_gib()
    return Machine(
        name=asked.name,
        device="cpu",
        device_name=cpu_name(),
        gpus_per_node=ranks,
        num_nodes=asked.num_nodes,
        memory_gib=asked.memory_gib or memory / ranks,
        host_memory_gib=memory,
        peak_tflops=vars(asked.peak_tflops),
        has_bf16=cpu_has_bf16(),
        num_cores=num_cores(),
        is_here=True,
        **figures(asked, {}),
    )


def figures(asked: Hardware, known: dict[str, Any]) -> dict[str, float | None]:
    """What was asked for of a device's figures, else what its card's preset knows."""
    values = {name: getattr(asked, name) for name in FIGURES}
    return {name: known.get(name) if v is None else v for name, v in values.items()}


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES (indices or UUIDs) leaves visible; none without a driver.

    Raises ConfigError for a name in CUDA_VISIBLE_DEVICES that no GPU has.
    """
    gpus = all_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not gpus:
        return gpus
    words = [word.strip() for word in chosen.split(",")]
    if words[0].startswith("MIG-"):
        return [named_gpu(words[0], slices(gpus))]  # CUDA gives a process one slice, the first
    return [named_gpu(word, gpus) for word in words if word not in ("", "-1")]


def named_gpu(word: str, gpus: list[Gpu]) -> Gpu:
    """The GPU of an index or of the beginning of a UUID."""
    for gpu in gpus:
        if word == gpu.number or (word[:4] in ("GPU-", "MIG-") and gpu.uuid.startswith(word)):
            return gpu
    known = ", ".join(gpu.number for gpu in gpus) or "none"
    raise ConfigError(
        "CUDA_VISIBLE_DEVICES", word, "names no GPU of this machine", f"it has {known}"
    )


def all_gpus() -> list[Gpu]:
    """Every GPU of this machine, asked of nvidia-smi because importing torch takes seconds."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "index,uuid,name,memory.total,compute_cap"
    answer = nvidia_smi(f"--query-gpu={query}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return [
        Gpu(number, uuid, name, float(mib) / 1024, float(capability))
        for number, uuid, name, mib, capability in (row for row in rows if is_whole(row))
    ]


def slices(gpus: list[Gpu]) -> list[Gpu]:
    """The MIG slices of some GPUs; their memory is a little less than their names say."""
    found: list[Gpu] = []
    card: Gpu | None = None
    for line in nvidia_smi("-L").splitlines():
        if whole := re.match(r"GPU (\d+):", line):
            card = next((gpu for gpu in gpus if gpu.number == whole[1]), None)
        if card and (part := MIG_LINE.match(line)):
            profile, gb, number, uuid = part.groups()
            name, gib = f"{card.name} MIG {profile}", MIG_SHARE * float(gb)
            found.append(Gpu(f"{card.number}:{number}", uuid, name, gib, card.compute_capability))
    return found


def nvidia_smi(*words: str) -> str:
    """What nvidia-smi answers."""
    command = ["nvidia-smi", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout


def usable_gib(gpu: Gpu) -> float:
    """What CUDA has of a card: nvidia-smi's total counts the driver's own part of it, too."""
    known: float | None = known_card(gpu.name).get("memory_gib")
    is_same = known is not None and known <= gpu.memory_gib < 1.05 * known  # cards get enlarged
    return known if known is not None and is_same else gpu.memory_gib


def is_whole(row: list[str]) -> bool:
    """Whether nvidia-smi knows every figure of a card: some answer [N/A]."""
    return len(row) == 5 and all(cell.replace(".", "").isdigit() for cell in row[3:])


def known_peak(gpu_name: str) -> dict[str, float | None]:
    """The datasheet peak of a card that a preset knows by name; nothing for any other."""
    unknown: dict[str, float | None] = {"fp32": None, "fp16": None, "bf16": None}
    return unknown | known_card(gpu_name).get("peak_tflops", {})


def known_card(gpu_name: str) -> dict[str, Any]:
    """The preset of a card by its name; empty for a card that none describes."""
    cards = [card(path.stem) for path in CARDS.glob("*.yaml")]
    for values in sorted(cards, key=lambda values: -len(values["product"])):
        wanted, found = set(values["product"].split()), set(re.split(r"[ -]", gpu_name))
        if wanted <= found and found - wanted <= PLAIN_WORDS:
            return values
    return {}


def card(name: str) -> dict[str, Any]:
    """A card's figures, over those of the card that its defaults list names."""
    values: dict[str, Any] = yaml.safe_load((CARDS / f"{name}.yaml").read_text())
    base = values.pop("defaults")[0].split("@")[0]
    return values if base.startswith("/") else card(base) | values


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory_gib() -> float:
    """This machine's memory, or the container's where that is less; of it this run's share."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    texts = [Path(path).read_text().strip() for path in limits if Path(path).exists()]
    share = float(os.environ.get(MEMORY_SHARE, 1))
    return share * min([total, *(int(text) for text in texts if text.isdigit())]) / GIB


def cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def cpu_name() -> str:
    """The processor's name, and how many cores this process may use."""
    found = re.search(r"model name\s*: (.+)", cpu_info())
    return (
        f"{found[1] if found else platform.processor() or platform.machine()}, {num_cores()} cores"
    )


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself."""
    return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", cpu_info()))


def cpu_prefers_bf16() -> bool:
    """Whether it multiplies bf16 faster than fp32, by what it is: a measurement may waver.

    Intel's AVX-512 takes bf16 at fp32's rate at best (measured: half of it), its AMX at eight
    times and AMD's AVX-512 at twice that. ARM's processors call theirs ``bf16``.
    """
    is_amd = "AuthenticAMD" in cpu_info()
    known = r"\b(avx512_bf16|amx_bf16|bf16)\b" if is_amd else r"\b(amx_bf16|bf16)\b"
    return bool(re.search(known, cpu_info()))
