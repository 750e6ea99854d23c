"""Whether driver, torch's CUDA and NCCL go together."""

from typing import Any

from llmtrain.doctor.line import Line, green, red, yellow
from llmtrain.hardware import Gpu

OLDER_CUDA = "https://download.pytorch.org/whl/cu126"
Version = tuple[int, int]


def unused(torch: dict[str, Any]) -> Line:
    """CUDA on a machine without a GPU."""
    build = f"is built for CUDA {torch['cuda']}" if torch["cuda"] else "is the CPU's build"
    return green("CUDA", found=f"not needed without a GPU; torch {torch['version']} {build}")


def driver(version: str, newest: Version | None, torch: dict[str, Any]) -> Line:
    """The driver beside the CUDA that torch was built for: the major version has to be reached."""
    if torch["cuda"] is None:
        plain = torch["version"].split("+")[0]
        found = f"torch {torch['version']} has no CUDA, so the GPUs are not used"
        remedy = f"pip install --force-reinstall torch=={plain}, without an index of CPU builds"
        return red("driver", found=found, remedy=remedy)
    does = f", for CUDA up to {newest[0]}.{newest[1]}" if newest else ""
    found = f"driver {version}{does}; torch is built for CUDA {torch['cuda']}"
    if newest and newest[0] < int(torch["cuda"].split(".")[0]):
        remedy = f"install a newer driver, or an older build of torch: {older_build(torch)}"
        return red("driver", found=found, remedy=remedy)
    if torch["problem"]:
        remedy = "if nvidia-smi works, reboot; in a container, compare its CUDA with the driver's"
        return red("driver", found=f"{found}, and it fails: {torch['problem']}", remedy=remedy)
    return green("driver", found=found)


def older_build(torch: dict[str, Any]) -> str:
    version = torch["version"].split("+")[0]
    return f"pip install --force-reinstall torch=={version} --index-url {OLDER_CUDA}"


def code(gpus: list[Gpu], torch: dict[str, Any]) -> Line:
    """Whether torch brings machine code for every card."""
    lacking = [gpu for gpu in gpus if not has_code(gpu.compute_capability, torch["archs"])]
    if not lacking:
        return green("GPU code", found=f"torch has code for compute {capabilities(gpus)}")
    found = f"torch {torch['version']} has no code for compute {capabilities(lacking)}"
    remedy = f"take a build that still has it: {older_build(torch)}"
    return red("GPU code", found=found, remedy=remedy)


def capabilities(gpus: list[Gpu]) -> str:
    return ", ".join(sorted({str(gpu.compute_capability) for gpu in gpus}))


def has_code(capability: float, archs: list[str]) -> bool:
    """sm_86 runs on 8.6 and later 8.x; compute_80 is compiled by the driver for any later card."""
    wanted = round(capability * 10)
    for arch in archs:
        kind, _, digits = arch.partition("_")
        number = int("".join(filter(str.isdigit, digits)) or 0)
        is_family = kind == "compute" or number // 10 == wanted // 10
        if is_family and number <= wanted:
            return True
    return False


def nccl(torch: dict[str, Any], packages: dict[str, str]) -> Line:
    """NCCL as torch was built with it, beside the installed package and its CUDA.

    ``packages`` are the installed ``nvidia-nccl-cu<major>`` with their versions.
    """
    if torch["nccl"] is None:
        return yellow("NCCL", found="torch has none", remedy="install torch's CUDA build")
    built = ".".join(map(str, torch["nccl"]))
    wanted = f"nvidia-nccl-cu{torch['cuda'].split('.')[0]}"
    others = [f"{name} {version}" for name, version in packages.items() if name != wanted]
    if others:
        found = f"torch is built for CUDA {torch['cuda']}, and {', '.join(others)} is installed"
        remedy = f"pip uninstall {' '.join(name for name in packages if name != wanted)}"
        return red("NCCL", found=found, remedy=f"{remedy}, then pip install {wanted}=={built}")
    installed = packages.get(wanted)
    if installed is not None and parts(installed)[:2] < torch["nccl"][:2]:
        found = f"torch is built with NCCL {built}, and {wanted} {installed} is installed"
        return red("NCCL", found=found, remedy=f"pip install {wanted}=={built}")
    return green("NCCL", found=f"{installed or built}, for CUDA {torch['cuda']} as torch")


def parts(version: str) -> list[int]:
    return [int(word) for word in version.split(".") if word.isdigit()]
