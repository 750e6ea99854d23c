"""Files of your own: .txt, .md, .jsonl and .parquet."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.corpus import Document, TextCorpus, digest
from llmtrain.data.rows import (
    BadRow,
    File,
    Row,
    check_readable,
    check_surrogates,
    file_bytes,
    find_files,
    format_of,
    identity,
    open_parquet,
    refusal,
    rows_of,
    standing_at,
)
from llmtrain.errors import ConfigError, nearest

PIECE = 64 * 1024  # a longer text file is several documents, so that part of it can be held out


@dataclass
class Text(TextCorpus):
    """``path`` is a file, a folder (with all below it) or a glob.

    A .txt or .md file is one document, or several of about 64 KiB that end at line ends; each row
    of a .jsonl or .parquet file is one, its text taken from ``text_field``.
    """

    kind: str = "text"
    text_field: str = "text"

    def check(self) -> None:
        super().check()
        files = self.files()
        check_readable(files)
        for file in first_of_each_format(files):
            next(self.read(file), None)  # a wrong text_field shows in the first row

    def documents(self) -> Iterator[Document]:
        for file in self.files():
            yield from self.read(file)

    def fingerprint(self) -> str:
        return digest([PIECE, self.text_field, *map(identity, self.files())])

    def num_bytes(self) -> int:
        return sum(file_bytes(file, self.text_field) for file in self.files())

    def files(self) -> list[File]:
        """Every file that ``path`` means, sorted by id; ConfigError where there is none."""
        return find_files(self.path, READERS)

    def read(self, file: File) -> Iterator[Document]:
        """The documents of one file, without the empty ones."""
        documents = READERS[format_of(file.path)](file, self.text_field)
        return (document for document in documents if document.text)


def first_of_each_format(files: list[File]) -> list[File]:
    return list({format_of(file.path): file for file in reversed(files)}.values())


def read_text(file: File, text_field: str) -> Iterator[Document]:
    """A whole file, or ``path#0``, ``path#1`` ... of about 64 KiB cut at line ends."""
    is_one = file.path.stat().st_size <= PIECE
    try:
        with open(file.path, encoding="utf-8-sig", newline="") as lines:
            # read() may stop within a line; readline() ends it, unless it has no end at all
            pieces = iter(lambda: lines.read(PIECE) + lines.readline(PIECE), "")
            for number, piece in enumerate(pieces):
                yield Document(file.id if is_one else f"{file.id}#{number}", piece)
    except UnicodeDecodeError:
        bad = BadRow("is not UTF-8", "convert the file, for instance with iconv")
        raise bad.at(f"{file.path}:{line_that_is_not_utf8(file.path)}", file.key) from None


def line_that_is_not_utf8(path: Path) -> int:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} is UTF-8 after all")


def read_rows(file: File, text_field: str) -> Iterator[Document]:
    """One document per row, ``path:1`` the first."""
    for row in rows_of(file, refuse, [text_field]):
        number = row.place.rpartition(":")[2]
        yield Document(f"{file.id}:{number}", text_of(row, text_field))


def refuse(error: ConfigError) -> None:
    raise error


def text_of(row: Row, text_field: str) -> str:
    with standing_at(row.place):
        if text_field not in row.values:
            raise BadRow(f"has no field {text_field}", rename(text_field, row.values))
        text = row.values[text_field]
        if not isinstance(text, str):
            raise BadRow(f"has {type(text).__name__} and not text in its field {text_field}")
        check_surrogates(text)
        return text


def read_parquet(file: File, text_field: str) -> Iterator[Document]:
    """One document per row; ConfigError where there is no such column."""
    columns = open_parquet(file).schema_arrow.names
    if text_field not in columns:
        raise refusal(file, f"has no column {text_field}", rename(text_field, columns))
    yield from read_rows(file, text_field)


READERS: dict[str, Callable[[File, str], Iterator[Document]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_rows,
    ".parquet": read_parquet,
}


def rename(text_field: str, names: Iterable[str]) -> str:
    """Remedy for a text field that is not there."""
    return f"set data.text_field ({nearest(text_field, names)})" if names else "remove that row"
