"""Compiled packages that make training faster: whether they load, not whether they are there."""

import importlib.util
from typing import NamedTuple

from llmtrain.doctor.ask import NoAnswer, ask
from llmtrain.doctor.line import Line, green, red, yellow

BUILD = "pip install --no-build-isolation"  # they compile against the torch that is installed
AFRESH = "--force-reinstall --no-cache-dir"  # pip keeps what it built against another torch
LARGEST_ERROR = 0.2  # half the widest gap between two of nf4's 16 numbers is 0.152


class Kernel(NamedTuple):
    """A package, the compiled extension by which it stands or falls, and what it is for."""

    name: str
    module: str
    use: str
    install: str


KERNELS = [
    Kernel("mamba-ssm", "selective_scan_cuda", "Mamba", f"{BUILD} mamba-ssm==2.3.2.post1"),
    Kernel("causal-conv1d", "causal_conv1d_cuda", "Mamba", f"{BUILD} causal-conv1d==1.7.0"),
    Kernel("flash-attn", "flash_attn_2_cuda", "attention", f"{BUILD} flash-attn==2.8.3.post2"),
]
BITSANDBYTES = Kernel(
    "bitsandbytes",
    "bitsandbytes",
    "adapter=qlora and optimizer=adamw8bit",
    "pip install -c constraints.txt -e '.[qlora]'",
)
LIGER = Kernel("Liger", "liger_kernel", "nothing here", "pip install liger-kernel==0.8.5")


def kernel_lines(device: str) -> list[Line]:
    """Each package as it is on this machine."""
    lines = [kernel_line(kernel, device, problem(kernel)) for kernel in KERNELS]
    return [
        *lines,
        bitsandbytes_line(quantization_problem(device)),
        liger_line(device, problem(LIGER)),
    ]


def problem(kernel: Kernel) -> str | None:
    """Why a compiled extension does not load: "" where it is not installed, None where it does."""
    if importlib.util.find_spec(kernel.module) is None:
        return ""
    try:
        ask("load", kernel.module)
    except NoAnswer as answer:
        return str(answer)
    return None


def quantization_problem(device: str) -> str | None:
    """Why bitsandbytes does not quantise, in the same form."""
    if importlib.util.find_spec(BITSANDBYTES.module) is None:
        return ""
    try:
        error = ask("quantize", device)
    except NoAnswer as answer:
        return str(answer)
    return None if error < LARGEST_ERROR else f"4 bits are off by {error:.2f}"


def kernel_line(kernel: Kernel, device: str, problem: str | None) -> Line:
    """A package that is for GPUs only; broken is worse than missing, because plans count on it."""
    if problem is None:
        return green(kernel.name, found=f"loads, for {kernel.use}")
    if device == "cpu":
        has = "installed" if problem else "not installed"
        return green(kernel.name, found=f"{has}; for GPUs, not used on a CPU")
    if not problem:
        found = f"not installed: {kernel.use} is slower without"
        return yellow(kernel.name, found=found, remedy=kernel.install)
    again = kernel.install.replace("install", f"install {AFRESH} --no-deps", 1)
    return red(kernel.name, found=f"installed and does not load: {problem}", remedy=again)


def bitsandbytes_line(problem: str | None) -> Line:
    """bitsandbytes works on a CPU too."""
    name, use, install = BITSANDBYTES.name, BITSANDBYTES.use, BITSANDBYTES.install
    if problem is None:
        return green(name, found=f"quantises to 4 bits, for {use}")
    if not problem:
        return yellow(name, found=f"not installed; {use} need it", remedy=install)
    again = install.replace("install", f"install {AFRESH}", 1)
    return yellow(name, found=f"does not quantise ({problem}); {use} need it", remedy=again)


def liger_line(device: str, problem: str | None) -> Line:
    """Nothing here uses Liger: losses over the vocabulary are in llmtrain.kernel."""
    if device == "cpu" and problem is not None:
        return kernel_line(LIGER, device, problem)
    if problem is None:
        return green(LIGER.name, found="loads; nothing here uses it")
    has = f"does not load ({problem})" if problem else "not installed"
    return green(LIGER.name, found=f"{has}; nothing here needs it", remedy=LIGER.install)
