"""Cached folders, each made once: whole or not at all, by one process at a time."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from llmtrain.errors import ConfigError


def make_once(folder: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """The folder, filled by ``make`` unless it ``is_whole`` already.

    A second process waits for the first and then finds its work done. One that is killed leaves a
    lock that the system frees and a temporary folder that the next one clears.
    """
    from filelock import FileLock

    if is_whole(folder):
        return folder
    create(folder.parent)
    with FileLock(f"{folder}.lock"):
        if not is_whole(folder):
            fill(folder, make)
    return folder


def fill(folder: Path, make: Callable[[Path], None]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        make(partial)
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)  # an older one that has lost files
    partial.rename(folder)
    sync_path(folder.parent)


def create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "cache_root",
            folder,
            f"cannot be made ({error.strerror})",
            "set cache_root to a folder that you can write to",
        ) from None


def sync(folder: Path) -> None:
    """Force a folder and the files in it to disk, so that the rename never outruns them."""
    for path in [*folder.iterdir(), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
