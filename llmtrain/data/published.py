"""What data sets of the catalogue share: whether they are here, and their size if they are not."""

import glob
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.data.catalogue import Published, default_folder
from llmtrain.data.corpus import BYTES_PER_TOKEN, Corpus
from llmtrain.errors import ConfigError

RECORD = ".download.json"  # hidden, so that no reader takes it for data


@dataclass
class PublishedCorpus(Corpus):
    """A data set where its download put it. Planning needs no file: the catalogue has its size."""

    published: Published = field(default_factory=Published)

    @property
    def lack(self) -> ConfigError | None:
        """Why it cannot be read yet, with the command that fetches it; None where it can be."""
        return lack_of(self.name, self.path, self.published)

    def fingerprint(self) -> str:
        if (lack := self.lack) is not None:
            raise lack
        return super().fingerprint()  # type: ignore[safe-super]

    def num_bytes(self) -> int:
        if self.lack is not None:
            return int(self.published.num_tokens * BYTES_PER_TOKEN)
        return super().num_bytes()  # type: ignore[safe-super]

    def estimate_tokens(self) -> int:
        if self.lack is not None:
            return int(self.published.num_tokens * (1 - self.held_out_fraction))
        return super().estimate_tokens()


@dataclass(frozen=True)
class Record:
    """What a download is to bring: from where, and the size of each file by its relative path."""

    repository: str
    revision: str
    files: dict[str, int]

    def missing(self, folder: Path) -> list[str]:
        """The files that are not there, or not whole."""
        return [name for name, size in self.files.items() if not is_whole(folder / name, size)]

    def save(self, folder: Path) -> None:
        partial = folder / f"{RECORD}.partial"
        partial.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")
        partial.rename(folder / RECORD)

    @classmethod
    def load(cls, folder: Path) -> "Record | None":
        """That of a folder; None where it was filled by other means."""
        path = folder / RECORD
        if not path.is_file():
            return None
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**saved)


def is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def lack_of(name: str, path: str | None, published: Published) -> ConfigError | None:
    """Why a data set cannot be read yet, with the command that fetches it; None where it can be.

    Files that came by other means are taken as they are.
    """
    if path is None or glob.has_magic(path) or Path(path).expanduser().is_file():
        return None
    folder = Path(path).expanduser()
    command = f"python -m llmtrain.data download {name}"
    command += f" --to {path}" if folder != default_folder(name) else ""
    record = Record.load(folder)
    if record is not None and (missing := record.missing(folder)):
        reason = f"is not whole: {len(missing)} of {len(record.files)} files are missing"
        return ConfigError("data", name, reason, f"continue: {command}")
    if record is not None or holds_any(folder, published):
        return None
    reason = f"is not in {path} yet ({published.download_gib:.3g} GiB)"
    return ConfigError("data", name, reason, f"fetch it: {command}")


def holds_any(folder: Path, published: Published) -> bool:
    """Whether a folder has a file of these data."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    seen = (name for name in names if not any(part.startswith(".") for part in name.parts))
    return any(published.holds(name.as_posix()) for name in seen)
