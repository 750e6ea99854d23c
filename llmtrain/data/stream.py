"""Published data without a download: each file is fetched, tokenised and dropped again."""

import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.catalogue import Published, parse_size
from llmtrain.data.corpus import BYTES_PER_TOKEN, digest
from llmtrain.data.download import GIB, part_of, require_any
from llmtrain.data.published import Record, is_whole
from llmtrain.data.repository import HuggingFace
from llmtrain.data.rows import File
from llmtrain.errors import ConfigError

ALL = "all"
HIDDEN = ".stream"  # below the data's folder, where no reader looks


@dataclass(frozen=True)
class Remote:
    """A file of the hub, at a revision that does not change, and about its bytes of text."""

    repository: str
    revision: str
    name: str
    size: int
    num_bytes: int

    @property
    def identity(self) -> tuple[object, ...]:
        return self.repository, self.revision, self.name, self.size


@dataclass(frozen=True)
class Stream:
    """About ``asked`` tokens of a data set (``all``, or a number such as 20b), spread over it.

    What there is is listed once, below ``path``: afterwards the same files are read, at the same
    revision, whatever becomes of the repository. A larger part has the files of a smaller one.
    """

    published: Published
    path: str | None
    asked: str

    def check(self) -> None:
        """Refuse an amount that is none, and a place that holds no folder."""
        if self.asked != ALL and not parse_size(self.asked):
            remedy = "say all, or a number of tokens such as 500m or 20b"
            raise ConfigError("data.stream", self.asked, "is no number of tokens", remedy)
        is_folder = self.path and not glob.has_magic(self.path)
        if not is_folder or Path(str(self.path)).expanduser().is_file():
            remedy = "give one where files may lie while they are read, or leave data.path out"
            raise ConfigError("data.path", self.path, "is no folder, for data.stream", remedy)

    @property
    def folder(self) -> Path:
        """For what is read of this repository, revision and choice of files."""
        published = self.published
        name = digest([published.hub, published.revision, *published.files])
        return Path(str(self.path)).expanduser() / HIDDEN / name

    @property
    def share(self) -> float:
        """Of all tokens."""
        tokens = parse_size(self.asked) or self.published.num_tokens
        return min(1.0, tokens / self.published.num_tokens)

    @property
    def num_bytes(self) -> int:
        """About how many of text, by the catalogue."""
        return int(self.share * self.published.num_tokens * BYTES_PER_TOKEN)

    def files(self) -> Iterator[Remote]:
        """What is read, in order. ConfigError where it was not listed yet, and cannot be now."""
        found = self.listing()
        text_per_byte = self.published.num_tokens * BYTES_PER_TOKEN
        text_per_byte /= self.published.download_gib * GIB
        for name, size in found.files.items():
            num_bytes = int(text_per_byte * size)
            yield Remote(found.repository, found.revision, name, size, num_bytes)

    def listing(self) -> Record:
        """That of the first time, or what the hub has now."""
        folder = self.folder / self.asked
        if (known := Record.load(folder)) is not None:
            return known
        with self.alone(self.folder / "listing.lock"):
            return Record.load(folder) or self.listed(folder)

    def listed(self, folder: Path) -> Record:
        repository = HuggingFace(self.published.hub, self.revision(), is_model=False)
        held = [file for file in repository.files() if self.published.holds(file.path)]
        require_any(repository, held, self.published.files)
        sizes = {file.path: file.size for file in part_of(held, self.share)}
        found = Record(repository.name, repository.revision, sizes)
        folder.mkdir(exist_ok=True)
        found.save(folder)
        return found

    def revision(self) -> str:
        """That at which another part was listed, so that both have the same files."""
        listed = map(Record.load, sorted(self.folder.glob("*")))
        return next((each.revision for each in listed if each), self.published.revision)

    @contextmanager
    def alone(self, lock: Path) -> Iterator[None]:
        """Hold a lock, in a folder that is made for it.

        It belongs to the process: a tokenizer that learns asks for texts from threads of its own.
        """
        from filelock import FileLock

        held = FileLock(lock, thread_local=False)
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.acquire()
        except OSError as error:
            reason = f"cannot be written to ({error.strerror})"
            remedy = "give data.path where files may lie while they are read"
            raise ConfigError("data.path", self.path, reason, remedy) from None
        try:
            yield
        finally:
            held.release()

    @contextmanager
    def fetched(self, remote: Remote) -> Iterator[File]:
        """A file of the hub on this disk, for one process at a time, which may remove it.

        Where it was not read to its end it is there already.
        """
        folder = self.folder / "files"
        path = folder / remote.name
        with self.alone(path.with_name(f"{path.name}.lock")):
            if not is_whole(path, remote.size):
                self.check_room(remote)
                repository = HuggingFace(remote.repository, remote.revision, is_model=False)
                repository.bring(remote.name, folder)
            yield File(path, remote.name, "data.stream")

    def check_room(self, remote: Remote) -> None:
        free = shutil.disk_usage(self.folder).free
        if remote.size > free:
            reason = f"has {free / GIB:.3g} GiB free, and a file takes {remote.size / GIB:.3g} GiB"
            remedy = "free some, give data.path on a larger disk, or take fewer data.num_workers"
            raise ConfigError("data.path", self.path, reason, remedy)
