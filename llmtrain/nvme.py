"""Whether a folder can hold training state that is offloaded to an NVMe disk."""

import os
import shutil
from pathlib import Path

from llmtrain.errors import ConfigError

BLOCKS = Path("/sys/dev/block")


def check_nvme(path: str | None, needed_gib: float) -> list[str]:
    """A line about a disk that would be slow. It is asked of the machine that the run is on.

    Raises ConfigError for a folder that is not given, does not exist (a misspelt one would fill
    the disk of its parent), cannot be written or has less than ``needed_gib`` free.
    """
    place = check_place(path)
    free_gib = shutil.disk_usage(place).free / 2**30
    if free_gib < needed_gib:
        reason = f"has {free_gib:.1f} GiB free, and {needed_gib:.1f} GiB are offloaded to it"
        raise refused(path, reason, "free some, or give a larger disk")
    disks = disks_of(place)
    if disks and all(disk.startswith("nvme") for disk in disks):
        return []
    what = f"the disk {' and '.join(disks)}" if disks else "no disk of its own (memory or network)"
    return [f"zero.nvme_path={path} lies on {what}, not on an NVMe: every step waits for it."]


def check_place(path: str | None) -> Path:
    """The folder, which is there and can be written."""
    if path is None:
        raise refused(path, "is needed to offload to nvme", "give a folder on an NVMe disk")
    place = Path(path).expanduser()
    if not place.is_dir():
        raise refused(path, "is no folder of this machine", "make it, or give one on an NVMe disk")
    if not os.access(place, os.W_OK | os.X_OK):
        raise refused(path, "cannot be written", "give a folder of your own on that disk")
    return place


def refused(path: str | None, reason: str, remedy: str) -> ConfigError:
    return ConfigError("zero.nvme_path", path, reason, remedy)


def disks_of(place: Path, blocks: Path = BLOCKS) -> list[str]:
    """The kernel's names of the disks that hold a folder: several below a RAID or a volume.

    Empty for what is no block device: memory, the network.
    """
    number = place.stat().st_dev
    device = blocks / f"{os.major(number)}:{os.minor(number)}"
    return sorted(disks_below(device.resolve())) if device.exists() else []


def disks_below(device: Path) -> set[str]:
    """A device, or those that it is stacked on."""
    folder = device / "slaves"
    slaves = [slave.resolve() for slave in folder.iterdir()] if folder.is_dir() else []
    return set().union(*map(disks_below, slaves)) if slaves else {device.name}
