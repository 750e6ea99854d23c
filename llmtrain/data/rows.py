"""Files of rows, where each row stands, and what is wrong with one."""

import glob
import importlib.util
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.data.corpus import OnBad
from llmtrain.errors import ConfigError

ROWS_AT_ONCE = 256  # of a parquet file, so that memory does not grow with it
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
UNPACKED = 3  # times the size of packed text, about: only estimates rest on it
UNPACKED_AT_ONCE = 2**20  # bytes
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Row(NamedTuple):
    """The fields of one row, and its ``file:number``: the line of a .jsonl, else the row."""

    values: dict[str, Any]
    place: str


@dataclass(frozen=True)
class File:
    """One file to read, the id that its documents begin with, and the key that gave it."""

    path: Path
    id: str
    key: str = "data.path"


class BadRow(Exception):
    """What is wrong with a row, while its place is not known yet."""

    def __init__(self, reason: str, remedy: str = "correct or remove that line") -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy

    def at(self, place: str, key: str) -> ConfigError:
        """The same as a user's mistake."""
        return ConfigError(key, f"{place}:", self.reason, self.remedy)


@contextmanager
def standing_at(place: str, key: str = "data.path") -> Iterator[None]:
    """Turn a BadRow into a ConfigError that names the row's place."""
    try:
        yield
    except BadRow as bad:
        raise bad.at(place, key) from None


def read_rows(path: str, on_bad: OnBad, key: str = "data.path") -> Iterator[Row]:
    """Every row of a file, a folder, a glob or a hub name, in order; a bad one goes to ``on_bad``.

    ``key`` is named in errors. Raises ConfigError for what cannot be read at all.
    """
    if is_hub_name(path):
        for number, values in enumerate(load_from_hub(path, key), start=1):
            yield Row(values, f"{path}:{number}")
        return
    for file in find_files(path, READERS, key):
        yield from rows_of(file, on_bad)


def rows_of(file: File, on_bad: OnBad, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of one file; of a parquet file these columns alone."""
    for number, row in READERS[format_of(file.path)](file, columns):
        place = f"{file.path}:{number}"
        try:
            yield Row(checked(row), place)
        except BadRow as bad:
            on_bad(bad.at(place, file.key))


def checked(row: Any) -> dict[str, Any]:
    values = parse(row) if isinstance(row, bytes) else row
    if not isinstance(values, dict):
        raise BadRow("is not a JSON object")
    return values


Numbered = Iterator[tuple[int, Any]]  # each row with its number; a line of a .jsonl as bytes


def read_json(file: File, columns: list[str] | None) -> Numbered:
    """A list of rows, also as the ``data`` of an object; or lines under the wrong name."""
    with open_bytes(file) as opened:
        content = opened.read()
    try:
        loaded = json.loads(content)
    except UnicodeDecodeError:
        raise refusal(file, "is not UTF-8", "convert it, for instance with iconv") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and content.removeprefix(BOM_UTF8).lstrip().startswith(b"{"):
            return read_jsonl(file, columns)
        reason = f"is not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        raise refusal(file, reason, "correct it") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond all bounds
        raise refusal(file, f"cannot be read ({error})", "correct it") from None
    if isinstance(loaded, dict):
        loaded = loaded.get("data", [loaded])
    if not isinstance(loaded, list):
        raise refusal(file, "is no list of rows", 'write [...] or {"data": [...]}')
    return enumerate(loaded, start=1)


def read_jsonl(file: File, columns: list[str] | None) -> Numbered:
    with open_bytes(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        raise BadRow("is not UTF-8", "convert the file, for instance with iconv") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"is not JSON (column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond all bounds
        raise BadRow(f"cannot be read ({error})") from None


def read_parquet(file: File, columns: list[str] | None) -> Numbered:
    batches = open_parquet(file).iter_batches(batch_size=ROWS_AT_ONCE, columns=columns)
    return enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


READERS: dict[str, Callable[[File, list[str] | None], Numbered]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def open_parquet(file: File) -> Any:
    """The opened file; ConfigError where it is damaged."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise refusal(file, "needs pyarrow to be read", "pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except (OSError, ValueError) as error:
        reason = f"is not a parquet file ({str(error).splitlines()[0].rstrip('.')})"
        raise refusal(file, reason, "write it again") from None


def is_hub_name(path: str) -> bool:
    """Whether it is ``org/name``, and neither the name of a file nor in a folder that is here."""
    is_name = HUB_NAME.fullmatch(path) and format_of(Path(path)) not in READERS
    return bool(is_name) and not Path(path).parent.is_dir()


def load_from_hub(name: str, key: str) -> Any:
    """The ``train`` split of a hub data set; ConfigError where it cannot be had."""
    check_hub_package(name, key)
    import datasets

    try:
        return datasets.load_dataset(name, split="train")
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"is no path here, and the hub does not give it ({first_line(error)})"
        raise ConfigError(key, name, reason, "correct it, or fetch it while online") from None


def check_hub_package(name: str, key: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        reason = "is no path here, and reading it from the hub needs the package datasets"
        raise ConfigError(key, name, reason, "correct it, or pip install -e '.[hub]'")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def check_rows(path: str, key: str = "data.path") -> None:
    """Refuse in milliseconds rows that cannot be read; no row is looked at."""
    if is_hub_name(path):
        check_hub_package(path, key)
        return
    files = find_files(path, READERS, key)
    check_readable(files)
    for file in files:
        if format_of(file.path) == ".parquet":
            open_parquet(file)


def rows_identity(path: str, key: str = "data.path") -> list[object]:
    """What tells these rows from others, found without reading them; a hub name is its own."""
    if is_hub_name(path):
        return [path]
    return [identity(file) for file in find_files(path, READERS, key)]


def rows_bytes(path: str, key: str = "data.path") -> int:
    """About how many bytes the rows have."""
    if is_hub_name(path):
        return int(load_from_hub(path, key).data.nbytes)
    return sum(file_bytes(file) for file in find_files(path, READERS, key))


def find_files(path: str | None, formats: Collection[str], key: str = "data.path") -> list[File]:
    """Every file that ``path`` means, sorted by id; ConfigError where there is none."""
    if path is None:
        raise ConfigError(
            key, None, "is not set", f"give a file, a folder or a glob: {key}=my_texts"
        )
    found = sorted(matches(path, formats, key), key=lambda file: file.id)
    if not found:
        raise ConfigError(
            key,
            path,
            f"holds no {', '.join(formats)} file",
            "convert your data to one of these formats, or correct the path",
        )
    return found


def matches(path: str, formats: Collection[str], key: str) -> Iterator[File]:
    """The readable formats under a file, a folder or a glob."""
    given = Path(path).expanduser()
    if given.is_file():
        yield from known_formats([given], given.parent, formats, key)
    elif given.is_dir():
        yield from known_formats(given.rglob("*"), given, formats, key)
    elif glob.has_magic(path):
        paths = map(Path, glob.iglob(str(given), recursive=True))
        yield from known_formats(paths, fixed_part(given), formats, key)
    else:
        raise ConfigError(key, path, "does not exist", f"give a path that does, from {Path.cwd()}")


def known_formats(
    paths: Iterable[Path], folder: Path, formats: Collection[str], key: str
) -> Iterator[File]:
    for path in paths:
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if format_of(path) in formats and path.is_file() and not is_hidden:
            yield File(path, name.as_posix(), key)


def format_of(path: Path) -> str:
    """The ending that tells how a file is read: of x.jsonl.gz it is .jsonl."""
    name = path.with_suffix("") if is_compressed(path) else path
    return name.suffix.lower()


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


@contextmanager
def open_bytes(file: File) -> Iterator[Any]:
    """A file's bytes, unpacked on the way; ConfigError where they are damaged."""
    if not is_compressed(file.path):
        with open(file.path, "rb") as opened:
            yield opened
        return
    import pyarrow

    try:
        packed = pyarrow.input_stream(str(file.path), COMPRESSED[file.path.suffix.lower()])
        with packed, BufferedReader(packed, UNPACKED_AT_ONCE) as opened:
            yield opened
    except (OSError, EOFError) as error:
        reason = f"cannot be unpacked ({first_line(error)})"
        raise refusal(file, reason, "fetch or write it again") from None


def fixed_part(pattern: Path) -> Path:
    """The folder of a glob before its first wildcard, to which ids are relative."""
    while glob.has_magic(str(pattern)):
        pattern = pattern.parent
    return pattern


def check_readable(files: list[File]) -> None:
    """Refuse a file that one may not read, and files that are all empty."""
    for file in files:
        if not os.access(file.path, os.R_OK):
            raise refusal(file, "cannot be read", "give yourself the right to read it")
    if not any(file.path.stat().st_size for file in files):
        raise refusal(files[0], "is empty", "give it some text")


def identity(file: File) -> tuple[str, str, int, int]:
    stat = file.path.stat()
    return file.id, str(file.path.resolve()), stat.st_size, stat.st_mtime_ns


def file_bytes(file: File, column: str | None = None) -> int:
    """A file's size, guessed where it is packed; of a parquet file, a column's or all, unpacked."""
    if format_of(file.path) != ".parquet":
        return file.path.stat().st_size * (UNPACKED if is_compressed(file.path) else 1)
    metadata = open_parquet(file).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if column in (None, chunk.path_in_schema)]
    return sum(chunk.total_uncompressed_size for chunk in wanted)


def check_surrogates(text: str) -> None:
    """Raise BadRow for text that no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("holds half of a surrogate pair, which is no character") from None


def refusal(file: File, reason: str, remedy: str) -> ConfigError:
    return ConfigError(file.key, file.path, reason, remedy)
