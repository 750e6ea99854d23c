"""The file in which a search stands, safe from processes that end in the middle of a line."""

import os
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock


class JournalLock(BaseJournalFileLock):
    """A lock that the system frees when its holder dies; Optuna's own is waited for in vain.

    Whoever takes it cuts off the line that somebody before could not finish.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FileLock(path.with_name(f"{path.name}.lock"))

    def acquire(self) -> bool:
        self.lock.acquire()
        cut_torn_line(self.path)
        return True

    def release(self) -> None:
        self.lock.release()


def cut_torn_line(path: Path) -> None:
    """Cut a file back to its last whole line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def journal(path: Path) -> Any:
    """Optuna's storage in a file that several processes may share."""
    lock = JournalLock(path)
    lock.acquire()
    lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock))
