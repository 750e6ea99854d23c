"""Files of your own: .txt, .md, .jsonl and .parquet."""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.data.corpus import Corpus, Document, digest
from llmtrain.errors import ConfigError, nearest

PIECE = 64 * 1024  # a longer text file is several documents, so that part of it can be held out
ROWS_AT_ONCE = 256  # of a parquet file, so that memory does not grow with it


@dataclass(frozen=True)
class File:
    """One file to read, and the id that its documents begin with."""

    path: Path
    id: str


@dataclass
class Text(Corpus):
    """``path`` is a file, a folder (with all below it) or a glob.

    A .txt or .md file is one document, or several of about 64 KiB that end at line ends; each row
    of a .jsonl or .parquet file is one, its text taken from ``text_field``.
    """

    kind: str = "text"
    text_field: str = "text"

    def check(self) -> None:
        super().check()
        files = self.files()
        for file in files:
            if not os.access(file.path, os.R_OK):
                raise bad(file.path, "cannot be read", "give yourself the right to read it")
        if not any(file.path.stat().st_size for file in files):
            raise bad(self.path, "is empty", "give it some text")
        for file in first_of_each_format(files):
            next(self.read(file), None)  # a wrong text_field shows in the first row

    def documents(self) -> Iterator[Document]:
        for file in self.files():
            yield from self.read(file)

    def fingerprint(self) -> str:
        return digest([PIECE, self.text_field, *map(identity, self.files())])

    def num_bytes(self) -> int:
        return sum(text_bytes(file.path, self.text_field) for file in self.files())

    def files(self) -> list[File]:
        """Every file that ``path`` means, sorted by id; ConfigError where there is none."""
        if self.path is None:
            raise bad(None, "is not set", "give a file, a folder or a glob: data.path=my_texts")
        found = sorted(matches(self.path), key=lambda file: file.id)
        if not found:
            raise bad(
                self.path,
                f"holds no {', '.join(READERS)} file",
                "convert your data to one of these formats, or correct the path",
            )
        return found

    def read(self, file: File) -> Iterator[Document]:
        """The documents of one file, without the empty ones."""
        documents = READERS[format_of(file.path)](file, self.text_field)
        return (document for document in documents if document.text)


def matches(path: str) -> Iterator[File]:
    """The readable formats under a file, a folder or a glob."""
    given = Path(path).expanduser()
    if given.is_file():
        yield from known_formats([given], given.parent)
    elif given.is_dir():
        yield from known_formats(given.rglob("*"), given)
    elif glob.has_magic(path):
        paths = glob.iglob(str(given), recursive=True)
        yield from known_formats(map(Path, paths), fixed_part(given))
    else:
        raise bad(path, "does not exist", f"give a path that does, from {Path.cwd()}")


def known_formats(paths: Iterable[Path], folder: Path) -> Iterator[File]:
    for path in paths:
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if format_of(path) in READERS and path.is_file() and not is_hidden:
            yield File(path, name.as_posix())


def format_of(path: Path) -> str:
    return path.suffix.lower()


def fixed_part(pattern: Path) -> Path:
    """The folder of a glob before its first wildcard, to which ids are relative."""
    while glob.has_magic(str(pattern)):
        pattern = pattern.parent
    return pattern


def first_of_each_format(files: list[File]) -> list[File]:
    return list({format_of(file.path): file for file in reversed(files)}.values())


def identity(file: File) -> tuple[str, str, int, int]:
    stat = file.path.stat()
    return file.id, str(file.path.resolve()), stat.st_size, stat.st_mtime_ns


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
        raise not_utf8(file.path, line_that_is_not_utf8(file.path)) from None


def line_that_is_not_utf8(path: Path) -> int:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} is UTF-8 after all")


def read_jsonl(file: File, text_field: str) -> Iterator[Document]:
    """One document per line, ``path:1`` the first."""
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                row = parse(line, file.path, number)
                yield Document(f"{file.id}:{number}", text_of(row, text_field, file.path, number))


def parse(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        raise not_utf8(path, number) from None
    except json.JSONDecodeError as error:
        reason = f"is not JSON (column {error.colno}: {error.msg})"
        raise bad_row(path, number, reason, "correct or remove that line") from None


def text_of(row: Any, text_field: str, path: Path, number: int) -> str:
    if not isinstance(row, dict):
        raise bad_row(path, number, "is not a JSON object", "correct or remove that line")
    if text_field not in row:
        raise bad_row(path, number, f"has no field {text_field}", rename(text_field, row))
    text = row[text_field]
    if not isinstance(text, str):
        reason = f"has {type(text).__name__} and not text in its field {text_field}"
        raise bad_row(path, number, reason, "correct or remove that line")
    if not text.isascii():
        check_surrogates(text, path, number)
    return text


def check_surrogates(text: str, path: Path, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        reason = "holds half of a surrogate pair, which is no character"
        raise bad_row(path, number, reason, "correct or remove that line") from None


def read_parquet(file: File, text_field: str) -> Iterator[Document]:
    """One document per row, ``path:1`` the first."""
    number = 0
    table = open_parquet(file.path, text_field)
    for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field]):
        for row in batch.to_pylist():
            number += 1
            yield Document(f"{file.id}:{number}", text_of(row, text_field, file.path, number))


def open_parquet(path: Path, text_field: str) -> Any:
    """The opened file; ConfigError where it is damaged or has no such column."""
    parquet = import_parquet()
    try:
        table = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        reason = f"is not a parquet file ({str(error).splitlines()[0].rstrip('.')})"
        raise bad(path, reason, "write it again") from None
    columns = table.schema_arrow.names
    if text_field not in columns:
        raise bad(path, f"has no column {text_field}", rename(text_field, columns))
    return table


def import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        reason = "needs pyarrow to read parquet"
        raise ConfigError("data", "text", reason, "pip install pyarrow") from None
    return pyarrow.parquet


def text_bytes(path: Path, text_field: str) -> int:
    """The size of a file's text: as it lies on disk, or uncompressed where its footer says it."""
    if format_of(path) != ".parquet":
        return path.stat().st_size
    metadata = open_parquet(path, text_field).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    named = [column for column in columns if column.path_in_schema == text_field]
    return sum(column.total_uncompressed_size for column in named)


READERS: dict[str, Callable[[File, str], Iterator[Document]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def bad(path: object, reason: str, remedy: str) -> ConfigError:
    return ConfigError("data.path", path, reason, remedy)


def bad_row(path: Path, number: int, reason: str, remedy: str) -> ConfigError:
    return bad(f"{path}:{number}:", reason, remedy)


def not_utf8(path: Path, number: int) -> ConfigError:
    return bad_row(path, number, "is not UTF-8", "convert the file, for instance with iconv")


def rename(text_field: str, names: Iterable[str]) -> str:
    """Remedy for a text field that is not there."""
    return f"set data.text_field ({nearest(text_field, names)})" if names else "remove that row"
