"""What DeepSpeed compiles at its first use, and what it takes: a compiler, ninja, libaio."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from llmtrain.doctor.line import Line, green, yellow

COMPILERS = ("c++", "g++", "clang++")
OFFLOAD = "the optimizer on the host, or optimizer=lion"


def find_compiler() -> str | None:
    """The first line of a C++ compiler's ``--version``."""
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        return None
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return (said.stdout.splitlines() or [found])[0]


def has_headers() -> bool:
    """Whether Python's own headers are there, which every extension includes."""
    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def compiler(version: str | None, has_headers: bool) -> Line:
    if version is None:
        found = f"no C++ compiler; needed for {OFFLOAD}, and train.compile"
        return yellow("compiler", found=found, remedy="apt-get install g++")
    if not has_headers:
        remedy = f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        return yellow("compiler", found=f"{version}, without Python.h", remedy=remedy)
    return green("compiler", found=f"{version}, with Python.h")


def ninja(on_path: str | None, beside_python: Path) -> Line:
    """torch asks the PATH for ninja, and a virtual environment that is not active is not on it."""
    if on_path is not None:
        return green("ninja", found=on_path)
    if not beside_python.exists():
        found = f"not installed; needed for {OFFLOAD}"
        return yellow("ninja", found=found, remedy="pip install -c constraints.txt ninja")
    setting = f'export PATH="{beside_python.parent}:$PATH"'
    found = f"{beside_python} is not on the PATH, where torch looks for it"
    return yellow("ninja", found=found, remedy=setting, setting=setting)


def ninja_here() -> Line:
    return ninja(shutil.which("ninja"), Path(sys.executable).with_name("ninja"))


def ops(found: dict[str, Any], device: str) -> Line:
    """Whether offload to the host and to NVMe can be compiled."""
    lacking = [name for name in ("Adam", "Lion") if not found[name]]
    if lacking:
        what = f"DeepSpeed cannot compile {' and '.join(lacking)} for the host"
        return yellow("DeepSpeed", found=what, remedy="see: ds_report")
    host = "Adam and Lion for the host can be compiled"
    if not found["NVMe"]:
        what = f"{host}; offload to NVMe cannot: libaio's headers are missing"
        remedy = "apt-get install libaio-dev (yum install libaio-devel)"
        return yellow("DeepSpeed", found=what, remedy=remedy)
    if device == "cuda" and found["cuda_home"] is None:
        what = f"{host}; offload to NVMe cannot: no CUDA toolkit (nvcc) is found"
        remedy = "install the toolkit of torch's CUDA, and export CUDA_HOME=<its folder>"
        return yellow("DeepSpeed", found=what, remedy=remedy)
    return green("DeepSpeed", found=f"{host}, and offload to NVMe")
