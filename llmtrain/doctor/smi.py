"""What nvidia-smi says, and what its words mean."""

import re
import shutil
import subprocess
from pathlib import Path

NVIDIA, DISPLAY = "0x10de", "0x03"  # PCI's vendor id, and the class of everything that is a GPU
PCI = Path("/sys/bus/pci/devices")


def exists() -> bool:
    return shutil.which("nvidia-smi") is not None


def say(*options: str) -> str:
    """nvidia-smi's answer or its complaint; nothing where it is not installed."""
    if not exists():
        return ""
    try:
        answer = subprocess.run(
            ["nvidia-smi", *options], capture_output=True, text=True, timeout=30, check=False
        )
    except subprocess.TimeoutExpired:
        return "no answer in 30 s"
    return answer.stdout or answer.stderr


def rows(query: str) -> list[list[str]]:
    """The cells of ``--query-...=...``, without units."""
    lines = say(query, "--format=csv,noheader,nounits").splitlines()
    return [[cell.strip() for cell in line.split(",")] for line in lines]


def cuda_of(text: str) -> tuple[int, int] | None:
    """The newest CUDA that a driver carries out, from the head of nvidia-smi's page."""
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def driver_of(text: str) -> str:
    found = re.search(r"(?:Driver|KMD) Version\s*:\s*([\d.]+)", text)
    return found[1] if found else "of an unknown version"


def is_on_bus() -> bool:
    """Whether the machine has an NVIDIA card at all, with a driver or without."""
    devices = PCI.iterdir() if PCI.exists() else ()
    return any(word(path, "vendor") == NVIDIA and is_gpu(path) for path in devices)


def is_gpu(path: Path) -> bool:
    return word(path, "class").startswith(DISPLAY)


def word(path: Path, name: str) -> str:
    return (path / name).read_text().strip() if (path / name).exists() else ""
