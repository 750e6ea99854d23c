"""The devices that a run would train on, and whether they go together."""

from collections import defaultdict

from llmtrain.doctor.line import Line, green, red, yellow
from llmtrain.hardware import Gpu, cpu_has_bf16, cpu_name

ALIKE = 0.02  # of memory: what the driver holds back differs a little between equal cards


def gpus_line(gpus: list[Gpu], num_installed: int) -> Line:
    """The cards, by kind, and what they multiply."""
    kinds: dict[str, int] = defaultdict(int)
    for gpu in gpus:
        kinds[f"{gpu.name}, {gpu.memory_gib:.1f} GiB, compute {gpu.compute_capability}"] += 1
    found = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    least = min(gpu.compute_capability for gpu in gpus)
    found += ", bf16" if least >= 8 else ", no bf16: runs take fp16"
    if len(gpus) < num_installed:
        found += f" (CUDA_VISIBLE_DEVICES hides {num_installed - len(gpus)} more)"
    return green("devices", found=found)


def cpu_line(smi_says: str, is_on_bus: bool, num_hidden: int = 0) -> Line:
    """The processor, where no GPU is seen; red where a card is there and its driver fails."""
    if num_hidden:
        found = f"CUDA_VISIBLE_DEVICES hides all {num_hidden} GPUs, so runs take the CPU: "
        return yellow("devices", found=found + processor(), remedy="unset CUDA_VISIBLE_DEVICES")
    if smi_says.startswith("GPU "):
        found = f"{smi_says.splitlines()[0][:80]}: its driver does not tell what it can do"
        return red("devices", found=found, remedy="install a newer driver, 525 at least")
    if smi_says:
        found = f"nvidia-smi is installed and shows no GPU: {smi_says.splitlines()[0][:150]}"
        remedy = "if there is a GPU, reload or reinstall its driver (a reboot often helps)"
        return (red if is_on_bus else yellow)("devices", found=found, remedy=remedy)
    if is_on_bus:
        found = (
            f"an NVIDIA card, and no nvidia-smi to reach it, so runs take the CPU: {processor()}"
        )
        remedy = "install NVIDIA's driver; in a container: docker run --gpus all"
        return yellow("devices", found=found, remedy=remedy)
    return green("devices", found=f"no GPU; {processor()}")


def processor() -> str:
    does = "multiplies bf16" if cpu_has_bf16() else "has no bf16: runs take fp32"
    return f"{cpu_name()}, {does}"


def alike(gpus: list[Gpu]) -> Line:
    """Whether every card is of one kind: the slowest sets the pace of all."""
    groups = groups_of(gpus)
    if len(groups) == 1:
        return green("alike", found=f"all {len(gpus)} GPUs are alike")
    kinds = [f"{', '.join(g.number for g in group)}: {describe(group[0])}" for group in groups]
    largest = ",".join(gpu.number for gpu in max(groups, key=len))
    setting = f"export CUDA_VISIBLE_DEVICES={largest}"
    remedy = f"together they are as slow as the slowest and as small as the smallest: {setting}"
    return yellow("alike", found=f"GPUs {'; '.join(kinds)}", remedy=remedy, setting=setting)


def groups_of(gpus: list[Gpu]) -> list[list[Gpu]]:
    """The cards in groups of one name and one size."""
    groups: list[list[Gpu]] = []
    for gpu in gpus:
        for group in groups:
            if is_like(gpu, group[0]):
                group.append(gpu)
                break
        else:
            groups.append([gpu])
    return groups


def is_like(one: Gpu, other: Gpu) -> bool:
    near = abs(one.memory_gib - other.memory_gib) <= ALIKE * other.memory_gib
    return one.name == other.name and near


def describe(gpu: Gpu) -> str:
    return f"{gpu.name} with {gpu.memory_gib:.0f} GiB"
