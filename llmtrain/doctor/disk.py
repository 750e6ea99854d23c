"""Where runs and caches are written: room, and how fast it takes a checkpoint."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from llmtrain.doctor.line import Line, green, red, yellow
from llmtrain.hardware import GIB

BLOCK_BYTES = 16 * 2**20
MOST_BLOCKS = 16
MOST_SECONDS = 2.0
LEAST_GIB, ENOUGH_GIB = 1.0, 20.0  # a checkpoint of 1B parameters takes about 12
SLOW = 50.0  # MB/s; a checkpoint of 1B parameters then takes 4 minutes


class Disk(NamedTuple):
    """A folder and its file system."""

    name: str
    folder: Path
    free_gib: float
    is_writable: bool


def disk_of(name: str, folder: Path) -> Disk:
    """The disk of a folder, or of the nearest one above it where it is not made yet."""
    above = existing(folder.expanduser().absolute())
    is_writable = os.access(above, os.W_OK | os.X_OK)
    return Disk(name, above, shutil.disk_usage(above).free / GIB, is_writable)


def room(disk: Disk, elsewhere: str) -> Line:
    """``elsewhere`` says how to have it on another disk."""
    found = f"{disk.free_gib:,.1f} GiB free in {disk.folder}"
    if not disk.is_writable:
        return red(disk.name, found=f"{disk.folder} cannot be written to", remedy=elsewhere)
    if disk.free_gib < LEAST_GIB:
        return red(disk.name, found=found, remedy=f"make room, or {elsewhere}")
    if disk.free_gib < ENOUGH_GIB:
        remedy = f"a checkpoint takes about 12 GB per 1B parameters: make room, or {elsewhere}"
        return yellow(disk.name, found=found, remedy=remedy)
    return green(disk.name, found=found)


def writing(megabytes: float) -> Line:
    """The speed at which checkpoints are saved, in MB/s."""
    found = f"{megabytes:,.0f} MB/s reach the disk of outputs"
    if megabytes < SLOW:
        remedy = "saving will be slow: say output_root=<folder on another disk>"
        return yellow("writing", found=found, remedy=remedy)
    return green("writing", found=found)


def writing_here(folder: Path) -> Line:
    disk = disk_of("writing", folder)
    if not disk.is_writable or disk.free_gib < LEAST_GIB:
        remedy = "see the line on outputs"
        return yellow("writing", found="not measured for lack of room or rights", remedy=remedy)
    return writing(write_speed(disk.folder))


def existing(folder: Path) -> Path:
    return folder if folder.is_dir() else existing(folder.parent)


def write_speed(folder: Path) -> float:
    """MB/s that reach the disk itself, in blocks that are synced one by one."""
    block = os.urandom(BLOCK_BYTES)  # a disk that compresses must not gain by it
    num_blocks, start = 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        while num_blocks < MOST_BLOCKS and time.perf_counter() - start < MOST_SECONDS:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            num_blocks += 1
        return num_blocks * BLOCK_BYTES / (time.perf_counter() - start) / 1e6
