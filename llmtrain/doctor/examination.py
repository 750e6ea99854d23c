"""Every check in its order."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from llmtrain.doctor import cuda, devices, disk, kernels, ops, packages, smi, speed, system
from llmtrain.doctor.ask import NoAnswer, ask
from llmtrain.doctor.holders import memory_lines
from llmtrain.doctor.line import Check, Line, green, look, red
from llmtrain.doctor.patient import Patient
from llmtrain.doctor.presets import preset_lines
from llmtrain.doctor.training import train
from llmtrain.errors import ConfigError
from llmtrain.hardware import visible_gpus


class Step(NamedTuple):
    """A check, and whether it takes more than a few seconds."""

    name: str
    check: Check
    is_slow: bool = False

    def look(self) -> list[Line]:
        return look(self.name, self.check)


def examine(patient: Patient, is_quick: bool) -> Iterator[Line]:
    """Every line in its order; what is quick is found side by side, what measures one by one."""
    steps = examination(patient)
    with ThreadPoolExecutor() as pool:
        for lines in pool.map(Step.look, [step for step in steps if not step.is_slow]):
            yield from lines
    for step in steps:
        if step.is_slow and not is_quick:
            yield from step.look()


def examination(patient: Patient) -> list[Step]:
    """What is looked at."""
    return [
        Step("devices", lambda: device_lines(patient)),
        Step("CUDA", lambda: cuda_lines(patient)),
        Step("packages", lambda: [packages.versions_here()]),
        Step("kernels", lambda: kernels.kernel_lines(patient.device)),
        Step("compiler", lambda: [ops.compiler(ops.find_compiler(), ops.has_headers())]),
        Step("ninja", lambda: [ops.ninja_here()]),
        Step("DeepSpeed", lambda: [ops.ops(ask("ops", patient.device), patient.device)]),
        Step("host memory", lambda: [system.host_memory_here()]),
        Step("shared memory", lambda: [system.shared_memory_here(len(patient.gpus))]),
        Step("open files", lambda: [system.open_files_here()]),
        Step("disk", lambda: disk_lines(patient)),
        Step("writing", lambda: [disk.writing_here(patient.outputs)], is_slow=True),
        Step("hub", lambda: [system.hub_here()], is_slow=True),
        Step("speed", lambda: speed_lines(patient), is_slow=True),
        Step("all-reduce", lambda: [reduction(patient)], is_slow=True),
        Step("training", lambda: [train(patient.num_ranks)], is_slow=True),
        Step("presets", lambda: preset_lines(patient.config.cache), is_slow=True),
    ]


def device_lines(patient: Patient) -> list[Line]:
    """Devices, whether they are alike, and who holds their memory."""
    try:
        gpus = visible_gpus()
    except ConfigError as error:
        return [red("devices", found=str(error), remedy="unset CUDA_VISIBLE_DEVICES")]
    except subprocess.TimeoutExpired:
        remedy = "a GPU may have failed: dmesg | grep -i xid; then reboot"
        return [red("devices", found="nvidia-smi does not answer", remedy=remedy)]
    if not gpus:
        says = "" if patient.num_installed else smi.say("-L")
        return [devices.cpu_line(says, smi.is_on_bus(), patient.num_installed)]
    lines = [devices.gpus_line(gpus, patient.num_installed)]
    lines += [devices.alike(gpus)] if len(gpus) > 1 else []
    return [*lines, *memory_lines(gpus, patient.used_gib, patient.holders)]


def cuda_lines(patient: Patient) -> list[Line]:
    """torch beside the driver and NCCL; red where torch cannot be imported at all."""
    try:
        torch = patient.torch
    except NoAnswer as problem:
        found = f"torch does not work: {problem}"
        return [red("torch", found=found, remedy=packages.INSTALL)]
    if not patient.gpus:
        return [cuda.unused(torch), dtypes(patient)]
    page = smi.say()
    lines = [cuda.driver(smi.driver_of(page), smi.cuda_of(page), torch)]
    if torch["cuda"] is not None and torch["problem"] is None:
        lines.append(cuda.code(patient.gpus, torch))
        lines.append(cuda.nccl(torch, packages.nccl_packages()))
    return [*lines, dtypes(patient)]


def dtypes(patient: Patient) -> Line:
    """What a small product comes out right in, on the device."""
    works = patient.torch["dtypes"]
    where = "on the GPU" if patient.torch["num_gpus"] else "on the CPU"
    if "fp32" not in works:
        found = f"a product in fp32 fails {where}"
        return red("dtypes", found=found, remedy="see the lines on driver and GPU code")
    is_emulated = patient.torch["num_gpus"] and min(g.compute_capability for g in patient.gpus) < 8
    slow = " (bf16 is emulated and slow: runs take fp16)" if is_emulated else ""
    return green("dtypes", found=f"{', '.join(works)} multiply {where}{slow}")


def disk_lines(patient: Patient) -> list[Line]:
    """Room for outputs and for caches, which may lie on one disk."""
    outputs = disk.disk_of("outputs", patient.outputs)
    cache = disk.disk_of("cache", patient.config.cache)
    return [
        disk.room(outputs, "say output_root=<folder on another disk>"),
        disk.room(cache, "export LLMTRAIN_CACHE=<folder on another disk>"),
    ]


def speed_lines(patient: Patient) -> list[Line]:
    found = speed.on_ranks("speed", patient.device, patient.num_ranks)
    return [speed.matmul(found, patient.gpus), speed.bandwidth(found, patient.device)]


def reduction(patient: Patient) -> Line:
    """Between all GPUs; on a CPU between two processes."""
    if len(patient.gpus) == 1:
        return green("all-reduce", found="one GPU: there is nothing to exchange")
    return speed.reduction(patient.device, len(patient.gpus) or 2)
