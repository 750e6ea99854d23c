"""Files of text in ranges that can be read by themselves, and the texts of a range."""

from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmtrain.data.corpus import OnBad
from llmtrain.data.rows import (
    ROWS_AT_ONCE,
    BadRow,
    File,
    check_surrogates,
    checked,
    file_bytes,
    first_line,
    format_of,
    is_compressed,
    open_bytes,
    open_parquet,
    refusal,
)
from llmtrain.errors import ConfigError, nearest

PIECE = 64 * 1024  # bytes; a longer text file is several documents, so that a part can be held out
NOT_UTF8 = ("is not UTF-8", "convert the file, for instance with iconv")

Texts = Iterator[tuple[str, str]]  # where each was read, and the text


@dataclass(frozen=True)
class Range:
    """Part of a file from ``start`` to before ``stop`` (None: to its end), with its bytes of text.

    They count row groups of a parquet file, and bytes of any other: whole pieces of a text file,
    and lines that begin there.
    """

    file: File
    start: int
    stop: int | None
    num_bytes: int

    @property
    def bounds(self) -> tuple[int, int]:
        return self.start, -1 if self.stop is None else self.stop


Reader = Callable[[Range, str, OnBad], Texts]


def ranges_of(file: File, most_bytes: int, text_field: str) -> Iterator[Range]:
    """A file in ranges of about so many bytes of text, a multiple of PIECE; a packed one in one."""
    if format_of(file.path) == ".parquet":
        yield from row_groups(file, most_bytes, text_field)
        return
    size = file_bytes(file)
    if size <= most_bytes or is_compressed(file.path):
        yield Range(file, 0, None, size)
        return
    for start in range(0, size, most_bytes):
        yield Range(file, start, start + most_bytes, min(most_bytes, size - start))


def row_groups(file: File, most_bytes: int, text_field: str) -> Iterator[Range]:
    """A parquet file in ranges of row groups; ConfigError where it has no such column."""
    parquet = open_parquet(file)
    column = column_of(file, parquet, text_field)
    first, size = 0, 0
    for number in range(parquet.metadata.num_row_groups):
        size += parquet.metadata.row_group(number).column(column).total_uncompressed_size
        if size >= most_bytes:
            yield Range(file, first, number + 1, size)
            first, size = number + 1, 0
    if first < parquet.metadata.num_row_groups or first == 0:
        yield Range(file, first, parquet.metadata.num_row_groups, size)


def column_of(file: File, parquet: Any, text_field: str) -> int:
    """The number of a parquet file's column."""
    names = parquet.schema_arrow.names
    if text_field not in names:
        raise refusal(file, f"has no column {text_field}", rename(text_field, names))
    schema = parquet.metadata.schema
    leaves = (schema.column(number).path.split(".")[0] for number in range(len(schema)))
    return list(leaves).index(text_field)


def rename(text_field: str, names: Iterable[str]) -> str:
    """Remedy for a text field that is not there."""
    return f"set data.text_field ({nearest(text_field, names)})" if names else "remove that row"


def read_text(item: Range, text_field: str, on_bad: OnBad) -> Texts:
    """A whole file, or pieces ``path#0``, ``path#1`` ... of about 64 KiB cut at line ends."""
    is_one = item.start == 0 and item.stop is None and item.num_bytes <= PIECE
    for number, begin, piece in pieces(item):
        try:
            text = piece.decode("utf-8-sig" if begin == 0 else "utf-8")
        except UnicodeDecodeError:
            text = without_bad_lines(piece, item.file, begin, on_bad)
        yield (item.file.id if is_one else f"{item.file.id}#{number}"), text


def pieces(item: Range) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and content of each piece of a range.

    A piece ends at the first line end behind a multiple of 64 KiB, or there if the next 64 KiB have
    none: so each can be found without reading those before it.
    """
    with open_bytes(item.file) as opened:
        if item.start:
            opened.seek(item.start)
        number, begin, held = item.start // PIECE, 0, None if item.start else b""
        while window := opened.read(PIECE):
            cut = first_cut(window) if number else 0
            if held is not None and (piece := held + window[:cut]):
                yield number - 1, begin, piece
            if item.stop is not None and number * PIECE >= item.stop:
                return
            begin, held = number * PIECE + cut, window[cut:]
            number += 1
        if held:
            yield number - 1, begin, held


def first_cut(window: bytes) -> int:
    """Behind the first line end; where there is none, before the first character that begins."""
    found = window.find(b"\n") + 1
    if found:
        return found
    return next((at for at, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)


def without_bad_lines(piece: bytes, file: File, begin: int, on_bad: OnBad) -> str:
    """The lines that are UTF-8; the others go to ``on_bad``."""
    kept, place = [], begin
    for line in piece.splitlines(keepends=True):
        try:
            kept.append(line.decode())
        except UnicodeDecodeError:
            report(BadRow(*NOT_UTF8), file, place, on_bad)
        place += len(line)
    return "".join(kept).removeprefix("\ufeff" if begin == 0 else "")


def report(bad: BadRow, file: File, begin: int, on_bad: OnBad) -> None:
    """Say what is wrong at a byte; where that is an error, by the number of its line.

    To count the lines before it costs much for one that is only left out.
    """
    try:
        on_bad(bad.at(f"{file.path}@{begin}", file.key))
    except ConfigError:
        raise bad.at(f"{file.path}:{line_at(file, begin)}", file.key) from None


def line_at(file: File, place: int) -> int:
    """The number of the line that begins at a byte: asked for mistakes alone, it reads up to it."""
    number, left = 1, place
    with open_bytes(file) as opened:
        while left and (block := opened.read(min(left, 2**20))):
            number += block.count(b"\n")
            left -= len(block)
    return number


def read_jsonl(item: Range, text_field: str, on_bad: OnBad) -> Texts:
    """One text for each line that begins in the range: ``path:1`` or, far behind, ``path@byte``."""
    for number, (begin, line) in enumerate(lines(item), start=1):
        if not line.strip():
            continue
        place = f"@{begin}" if item.start else f":{number}"
        try:
            yield f"{item.file.id}{place}", text_of(line, text_field)
        except BadRow as bad:
            report(bad, item.file, begin, on_bad)


def lines(item: Range) -> Iterator[tuple[int, bytes]]:
    """Each line that begins in a range, and where it does."""
    with open_bytes(item.file) as opened:
        begin = item.start
        if begin:
            opened.seek(begin - 1)
            begin += len(opened.readline()) - 1
        for line in opened:
            if item.stop is not None and begin >= item.stop:
                return
            yield begin, line.removeprefix(BOM_UTF8) if begin == 0 else line
            begin += len(line)


def read_parquet(item: Range, text_field: str, on_bad: OnBad) -> Texts:
    """One text for each row, ``path:1`` the first of the file."""
    parquet = open_parquet(item.file)
    groups = [parquet.metadata.row_group(number).num_rows for number in range(item.stop or 0)]
    number = sum(groups[: item.start])
    chosen = list(range(item.start, item.stop or 0))
    batches = parquet.iter_batches(ROWS_AT_ONCE, row_groups=chosen, columns=[text_field])
    for rows in listed(item.file, batches):
        for row in rows:
            number += 1
            try:
                yield f"{item.file.id}:{number}", text_of(row, text_field)
            except BadRow as bad:
                on_bad(bad.at(f"{item.file.path}:{number}", item.file.key))


def listed(file: File, batches: Iterator[Any]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each batch; ConfigError where the file is damaged or its text is no UTF-8."""
    try:
        for batch in batches:
            yield batch.to_pylist()
    except (OSError, ValueError) as error:
        raise refusal(file, f"cannot be read ({first_line(error)})", "write it again") from None


def text_of(row: Any, text_field: str) -> str:
    values = checked(row)
    if text_field not in values:
        raise BadRow(f"has no field {text_field}", rename(text_field, values))
    text = values[text_field]
    if not isinstance(text, str):
        raise BadRow(f"has {type(text).__name__} and not text in its field {text_field}")
    check_surrogates(text)
    return text


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
