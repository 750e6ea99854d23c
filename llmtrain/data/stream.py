"""Published data without a download: each file is fetched, tokenised and dropped again."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.catalogue import Published, parse_size
from llmtrain.data.corpus import BYTES_PER_TOKEN
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

    What there is is listed once, below ``folder``: afterwards the same files are read, at the same
    revision, whatever becomes of the repository. A larger part has the files of a smaller one.
    """

    published: Published
    folder: Path
    asked: str

    def check(self) -> None:
        if self.asked != ALL and not parse_size(self.asked):
            remedy = "say all, or a number of tokens such as 500m or 20b"
            raise ConfigError("data.stream", self.asked, "is no number of tokens", remedy)

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
        folder = self.folder / HIDDEN / self.asked
        if (known := Record.load(folder)) is not None:
            return known
        repository = HuggingFace(self.published.hub, self.revision(), is_model=False)
        held = [file for file in repository.files() if self.published.holds(file.path)]
        require_any(repository, held, self.published.files)
        sizes = {file.path: file.size for file in part_of(held, self.share)}
        folder.mkdir(parents=True, exist_ok=True)
        found = Record(repository.name, repository.revision, sizes)
        found.save(folder)
        return found

    def revision(self) -> str:
        """That at which another part was listed, so that both have the same files."""
        listed = map(Record.load, sorted((self.folder / HIDDEN).glob("*")))
        return next((each.revision for each in listed if each), self.published.revision)

    def fetch(self, remote: Remote) -> File:
        """A file of the hub on this disk; it is there already where it was not read to its end."""
        folder = self.folder / HIDDEN / "files"
        path = folder / remote.name
        if not is_whole(path, remote.size):
            HuggingFace(remote.repository, remote.revision, is_model=False).bring(
                remote.name, folder
            )
        return File(path, remote.name, "data.stream")
