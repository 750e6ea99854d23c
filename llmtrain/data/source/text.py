"""Files of your own: .txt, .md, .jsonl and .parquet, also packed as .gz and .zst."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from llmtrain.data.corpus import Document, OnBad, OnBadRow, Slice, TextCorpus, digest
from llmtrain.data.filtering import Filter
from llmtrain.data.ranges import READERS, Range, Reader, ranges_of
from llmtrain.data.rows import (
    File,
    check_readable,
    file_bytes,
    find_files,
    format_of,
    identity,
)
from llmtrain.data.split import hash_of
from llmtrain.errors import ConfigError

SLICE_BYTES = 64 * 2**20  # of text, about: what is lost at most by a kill, for each worker
MOST_BAD_FIRST = 100  # rows at the start of a file before it is taken for another kind
MANY = 16  # one file in so many ends a slice of an eighth


@dataclass
class Text(TextCorpus):
    """``path`` is a file, a folder (with all below it) or a glob.

    A .txt or .md file is one document, or several of about 64 KiB that end at line ends; each row
    of a .jsonl or .parquet file is one, its text taken from ``text_field``. What cannot be read is
    refused or, where ``on_bad_row`` is ``skip``, counted and left out. What does not pass
    ``filter`` is counted and left out.
    """

    kind: str = "text"
    text_field: str = "text"
    on_bad_row: OnBadRow = OnBadRow.fail
    filter: Filter = field(default_factory=Filter)

    readers: ClassVar[dict[str, Reader]] = READERS

    def check(self) -> None:
        super().check()
        self.filter.check("data.filter")
        files = self.files()
        check_readable(files)
        for file in first_of_each_format(files):
            first = next(ranges_of(file, SLICE_BYTES, self.text_field))
            next(self.read([first], self.patience()), None)  # a wrong text_field shows

    def patience(self) -> OnBad:
        """Refuses bad rows, where they are skipped the first of many."""
        left = iter(range(MOST_BAD_FIRST if self.skips_bad else 0))

        def note(error: ConfigError) -> None:
            if next(left, None) is None:
                raise error

        return note

    @property
    def filters(self) -> bool:
        return bool(self.filter.words)

    @property
    def skips_bad(self) -> bool:
        return self.on_bad_row is OnBadRow.skip

    def documents(self) -> Iterator[Document]:
        for slice in self.slices():
            found = self.read_slice(slice, Path(), self.raise_unless_skipped)
            yield from (document for document in found if not document.lack)

    def slices(self) -> Iterator[Slice]:
        for group in grouped(self.ranges()):
            ranges = [item for item, _ in group]
            identities = (part for item in ranges for part in (*identity(item.file), *item.bounds))
            yield Slice((*self.how, *identities), sum(size for _, size in group), ranges)

    @property
    def how(self) -> tuple[object, ...]:
        """What beside the files decides which documents a slice has."""
        return (self.kind, self.text_field, self.on_bad_row.value, *self.filter.words)

    def ranges(self) -> Iterator[tuple[Range, int]]:
        """Every file in ranges that can be read by themselves, with their bytes of text."""
        for file in self.files():
            for item in ranges_of(file, SLICE_BYTES, self.text_field):
                yield item, item.num_bytes

    def read_slice(self, slice: Slice, tokenizer: Path, on_bad: OnBad) -> Iterator[Document]:
        return self.read(slice.content, on_bad)

    def read(self, ranges: Iterable[Range], on_bad: OnBad) -> Iterator[Document]:
        """The documents of ranges, without the empty ones; equal texts have equal ids.

        Those that do not pass the filter are among them, with what they lack.
        """
        for item in ranges:
            for place, text in self.readers[format_of(item.file.path)](
                item, self.text_field, on_bad
            ):
                if text:
                    lack = self.filter.lack_of(text)
                    yield Document(id_of(text), text, place=place, lack=lack)

    def fingerprint(self) -> str:
        how = (self.text_field, self.on_bad_row.value, *self.filter.words)
        return digest([*how, *map(identity, self.files())])

    def num_bytes(self) -> int:
        return sum(file_bytes(file, self.text_field) for file in self.files())

    def files(self) -> list[File]:
        """Every file that ``path`` means, sorted by id; ConfigError where there is none."""
        return find_files(self.path, self.readers)


def first_of_each_format(files: list[File]) -> list[File]:
    return list({format_of(file.path): file for file in reversed(files)}.values())


def id_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def grouped(ranges: Iterable[tuple[Range, int]]) -> Iterator[list[tuple[Range, int]]]:
    """Consecutive small files together; a range of a large one stands alone.

    Some files, by the hash of their name, end a group early: so a new file changes its own group
    and perhaps the next, and not all after it.
    """
    group: list[tuple[Range, int]] = []
    size = 0
    for item, num_bytes in ranges:
        if group and size + num_bytes > SLICE_BYTES:
            yield group
            group, size = [], 0
        group.append((item, num_bytes))
        size += num_bytes
        if size > SLICE_BYTES / 8 and hash_of(item.file.id) % MANY == 0:
            yield group
            group, size = [], 0
    if group:
        yield group
