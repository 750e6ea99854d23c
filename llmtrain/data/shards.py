"""Documents tokenised once into memory-mapped shards, and the manifest that describes them."""

import hashlib
import json
import lzma
import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.cache import make_once
from llmtrain.data.corpus import BYTES_PER_TOKEN, Corpus, Document, digest
from llmtrain.data.split import hold_out
from llmtrain.data.tokenizer import Vocabulary, load, make_vocabulary, origin_of
from llmtrain.errors import ConfigError

FORMAT = 1  # raise it when the files change, so that older caches are not taken for new ones
SHARD_TOKENS = 2**28  # at most, each: 0.5 GiB of uint16
BATCH_CHARACTERS = 4 * 2**20  # encoded at once: keeps every core busy and memory constant
MOST_XZ_BYTES = 32 * 2**20  # xz needs a second for each MiB

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Split:
    """One side of the corpus; ``shards`` are the token files in order, ``sha`` their content."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    shards: tuple[str, ...]
    sha: str


@dataclass(frozen=True)
class Manifest:
    """What was prepared, and where.

    ``fingerprint`` covers sources, tokenizer and split rule, by which the folder is found. Each
    split's ``sha`` covers the tokens themselves, whatever path they were read from.
    """

    folder: Path
    fingerprint: str
    dtype: str
    vocabulary: Vocabulary
    splits: dict[str, Split]
    held_out_xz_bits_per_byte: float | None

    @property
    def train(self) -> Split:
        return self.splits["train"]

    @property
    def held_out(self) -> Split:
        return self.splits["held_out"]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read ``manifest.json`` of a folder that :func:`prepare` made."""
        saved = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = folder.parent.parent / "tokenizers" / saved["vocabulary"].pop("folder")
        vocabulary = Vocabulary(folder=tokenizer, **saved.pop("vocabulary"))
        splits = {name: to_split(split) for name, split in saved.pop("splits").items()}
        return cls(folder=folder, vocabulary=vocabulary, splits=splits, **saved)

    def save(self) -> None:
        saved = asdict(self)
        del saved["folder"]  # both folders are found from where the file lies: a cache may move
        saved["vocabulary"]["folder"] = self.vocabulary.folder.name
        text = json.dumps(saved, indent=2) + "\n"
        (self.folder / "manifest.json").write_text(text, encoding="utf-8")


def to_split(saved: dict[str, Any]) -> Split:
    return Split(**{**saved, "shards": tuple(saved["shards"])})


def prepare(
    corpus: Corpus, cache_root: Path, tokenizer_path: str | None = None, progress: bool = True
) -> Manifest:
    """Tokenise a corpus unless that was done before, and return its manifest.

    ``tokenizer_path`` (a pretrained model's) goes before ``corpus.tokenizer.path``. A bar is shown
    on stderr if ``progress`` and it is a terminal. ConfigError for data that cannot be read and
    for a split without documents. Processes that prepare the same corpus at once do it once.
    """
    corpus.check()
    cache_root = cache_root.expanduser().absolute()
    sources = corpus.fingerprint()
    origin = origin_of(corpus, sources, tokenizer_path)
    fingerprint = combine(corpus, sources, origin.key)

    def make(folder: Path) -> None:
        check_space(corpus, folder)
        vocabulary = make_vocabulary(origin, cache_root)
        with bar(corpus, progress) as advance:
            tokenize(corpus, vocabulary, fingerprint, folder, advance)

    return Manifest.load(make_once(folder_of(cache_root, fingerprint), is_whole, make))


def find_manifest(
    corpus: Corpus, cache_root: Path, tokenizer_path: str | None = None
) -> Manifest | None:
    """The manifest of a corpus that was prepared before; None if it was not. Reads no tokens."""
    sources = corpus.fingerprint()
    fingerprint = combine(corpus, sources, origin_of(corpus, sources, tokenizer_path).key)
    folder = folder_of(cache_root.expanduser().absolute(), fingerprint)
    return Manifest.load(folder) if is_whole(folder) else None


def combine(corpus: Corpus, sources: str, tokenizer_key: str) -> str:
    return digest([FORMAT, SHARD_TOKENS, sources, tokenizer_key, corpus.held_out_every])


def folder_of(cache_root: Path, fingerprint: str) -> Path:
    return cache_root / "tokens" / fingerprint


def is_whole(folder: Path) -> bool:
    """Whether the manifest and every file it names are there, of the right size."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = Manifest.load(folder)
    has_tokenizer = (manifest.vocabulary.folder / "tokenizer.json").is_file()
    return has_tokenizer and all(
        bytes_of(folder, split) == split.num_tokens * np.dtype(manifest.dtype).itemsize
        for split in manifest.splits.values()
    )


def bytes_of(folder: Path, split: Split) -> int:
    files = [folder / name for name in split.shards]
    indexes = [index_of(file) for file in files]
    if not all(file.is_file() for file in [*files, *indexes]):
        return -1
    return sum(file.stat().st_size for file in files)


def index_of(shard: Path) -> Path:
    """Beside each shard: where documents start in it, int64 offsets into the split's tokens."""
    return shard.with_suffix(".npy")


def check_space(corpus: Corpus, folder: Path) -> None:
    free_gib = shutil.disk_usage(folder).free / 2**30
    needed_gib = corpus.num_bytes() / BYTES_PER_TOKEN * 4 / 2**30  # at most 4 bytes a token
    if needed_gib > free_gib:
        raise ConfigError(
            "cache_root",
            folder.parent.parent,
            f"has {free_gib:.1f} GiB free and the tokens take up to {needed_gib:.1f} GiB",
            "free some or set cache_root to a larger disk",
        )


def tokenize(
    corpus: Corpus, vocabulary: Vocabulary, fingerprint: str, folder: Path, advance: Advance
) -> None:
    """Fill ``folder`` with the shards of both splits, and last with the manifest."""
    dtype = "uint16" if vocabulary.size <= 2**16 else "uint32"
    encode = partial(encode_batch, load(vocabulary.folder), vocabulary.eos_id, np.dtype(dtype))
    holds_out = hold_out(corpus)
    xz = XzMeter()
    with ShardWriter(folder, "train") as train, ShardWriter(folder, "held_out") as held_out:
        for batch in batches(corpus.documents(), BATCH_CHARACTERS):
            for document, tokens in zip(batch, encode(batch), strict=True):
                text = document.text.encode()
                if holds_out(document.id):
                    held_out.add(tokens, len(text))
                    xz.add(text)
                else:
                    train.add(tokens, len(text))
                advance(len(text))
    splits = {writer.name: writer.split() for writer in (train, held_out)}
    check_splits(corpus, splits)
    Manifest(folder, fingerprint, dtype, vocabulary, splits, xz.bits_per_byte()).save()


def batches(documents: Iterator[Document], characters: int) -> Iterator[list[Document]]:
    """Consecutive documents of about so many characters together."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(
    tokenizer: Any, eos_id: int, dtype: np.dtype[Any], batch: list[Document]
) -> list[npt.NDArray[Any]]:
    """Token ids of each document, ended by ``eos_id``; the library spreads them over all cores."""
    texts = [document.text for document in batch]
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([*encoding.ids, eos_id], dtype=dtype) for encoding in encoded]


def check_splits(corpus: Corpus, splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        if split.num_documents == 0:
            raise ConfigError(
                "data.held_out_every",
                corpus.held_out_every,
                f"leaves no document in the {name} split",
                "add documents or change data.held_out_every",
            )


class ShardWriter:
    """One split's tokens, appended to files of ``shard_tokens`` each; a document may span two."""

    def __init__(self, folder: Path, name: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = folder
        self.name = name
        self.shard_tokens = shard_tokens
        self.shards: list[str] = []
        self.starts = array("q")  # of the open shard's documents
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self.room = 0  # tokens that the open shard still takes
        self.file: Any = None
        self.sha = hashlib.sha256()

    def add(self, tokens: npt.NDArray[Any], num_bytes: int) -> None:
        """Append one document of ``num_bytes`` of text."""
        if self.room == 0:
            self.open_next()
        self.starts.append(self.num_tokens)
        self.num_documents += 1
        self.num_bytes += num_bytes
        self.sha.update(tokens.tobytes())
        while len(tokens) > self.room:
            head, tokens = tokens[: self.room], tokens[self.room :]
            self.append(head)
            self.open_next()
        self.append(tokens)

    def append(self, tokens: npt.NDArray[Any]) -> None:
        self.file.write(tokens.tobytes())
        self.num_tokens += len(tokens)
        self.room -= len(tokens)

    def open_next(self) -> None:
        self.close_shard()
        self.shards.append(f"{self.name}_{len(self.shards):05d}.bin")
        self.file = open(self.folder / self.shards[-1], "wb")  # noqa: SIM115  (closed at its end)
        self.room = self.shard_tokens

    def close_shard(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
            starts = np.array(self.starts, dtype=np.int64)
            np.save(index_of(self.folder / self.shards[-1]), starts)
            self.starts = array("q")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close_shard()

    def split(self) -> Split:
        """What was written."""
        counts = (self.num_documents, self.num_tokens, self.num_bytes)
        return Split(*counts, tuple(self.shards), self.sha.hexdigest())


class XzMeter:
    """What ``xz -9`` makes of the held-out text, in bits per byte; None if that is too long."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.num_bytes = 0

    def add(self, text: bytes) -> None:
        self.num_bytes += len(text)
        if self.num_bytes <= MOST_XZ_BYTES:
            self.texts.append(text)

    def bits_per_byte(self) -> float | None:
        if not 0 < self.num_bytes <= MOST_XZ_BYTES:
            return None
        return 8 * len(lzma.compress(b"".join(self.texts), preset=9)) / self.num_bytes


@contextmanager
def bar(corpus: Corpus, progress: bool) -> Iterator[Advance]:
    """A function that moves a progress bar on by some bytes of text."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    hidden = not (progress and console.is_terminal)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden
    ) as shown:
        task = shown.add_task(f"tokenising {corpus.name}", total=corpus.num_bytes())
        yield lambda num_bytes: shown.advance(task, num_bytes)
