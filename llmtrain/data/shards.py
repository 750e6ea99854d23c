"""Documents tokenised once into memory-mapped shards, and the manifest that describes them."""

import hashlib
import json
import lzma
import shutil
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.cache import make_once
from llmtrain.data.corpus import BYTES_PER_TOKEN, Corpus, Document, digest
from llmtrain.data.encoding import Encoder
from llmtrain.data.split import HoldsOut, hold_out
from llmtrain.data.tokenizer import Vocabulary, make_vocabulary, origin_of
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    pass

FORMAT = 4  # raise it when the files change, so that older caches are not taken for new ones
SHARD_TOKENS = 2**28  # at most, each: 0.5 GiB of uint16
BATCH_CHARACTERS = 4 * 2**20  # encoded at once: keeps every core busy and memory constant
MOST_XZ_BYTES = 32 * 2**20  # xz needs a second for each MiB

MOST_REASONS = 10  # of skipped rows are kept; the rest are counted

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Split:
    """One side of the corpus; ``shards`` are the token files in order, ``sha`` their content.

    ``num_learned_tokens`` have a loss when everything is read once; ``num_bytes`` are theirs.
    """

    num_documents: int
    num_tokens: int
    num_learned_tokens: int
    num_bytes: int
    shards: tuple[str, ...]
    sha: str


@dataclass(frozen=True)
class Manifest:
    """What was prepared, and where.

    ``fingerprint`` covers sources, tokenizer and split rule, by which the folder is found. Each
    split's ``sha`` covers the tokens themselves, whatever path they were read from. ``skipped``
    are the reasons of rows that were left out, the first few of ``num_skipped``.
    """

    folder: Path
    fingerprint: str
    dtype: str
    vocabulary: Vocabulary
    splits: dict[str, Split]
    held_out_xz_bits_per_byte: float | None
    has_masks: bool = False
    chat_template: str | None = None
    num_skipped: int = 0
    skipped: tuple[str, ...] = ()

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
        saved["skipped"] = tuple(saved["skipped"])
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
    parts = [FORMAT, SHARD_TOKENS, sources, tokenizer_key, corpus.held_out_fraction]
    return digest([*parts, *corpus.writing()])


def folder_of(cache_root: Path, fingerprint: str) -> Path:
    return cache_root / "tokens" / fingerprint


def is_whole(folder: Path) -> bool:
    """Whether the manifest and every file it names are there, of the right size."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = Manifest.load(folder)
    has_tokenizer = (manifest.vocabulary.folder / "tokenizer.json").is_file()
    return has_tokenizer and all(
        bytes_of(folder, split, manifest.has_masks)
        == split.num_tokens * np.dtype(manifest.dtype).itemsize
        for split in manifest.splits.values()
    )


def bytes_of(folder: Path, split: Split, has_masks: bool) -> int:
    files = [folder / name for name in split.shards]
    beside = [index_of(file) for file in files]
    beside += [mask_of(file) for file in files if has_masks]
    if not all(file.is_file() for file in [*files, *beside]):
        return -1
    return sum(file.stat().st_size for file in files)


def index_of(shard: Path) -> Path:
    """Beside each shard: where documents start in it, int64 offsets into the split's tokens."""
    return shard.with_suffix(".npy")


def mask_of(shard: Path) -> Path:
    """Beside a shard of documents that are learned in part: a byte for each token, 1 if it is."""
    return shard.with_suffix(".mask")


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
    encode = Encoder(vocabulary, np.dtype(dtype))
    holds_out = hold_out(corpus) if corpus.held_out_fraction else None
    skipped = Skipped(corpus)
    has_dialogues = False
    xz = XzMeter()
    with ShardWriter(folder, "train") as train, ShardWriter(folder, "held_out") as held_out:
        writers = {"train": train, "held_out": held_out}
        documents = corpus.written(vocabulary.folder, skipped.note)
        for batch in batches(documents, BATCH_CHARACTERS):
            for document, (tokens, mask) in zip(batch, encode(batch), strict=True):
                has_dialogues |= document.is_dialogue
                split = document.split or split_of(document, holds_out)
                writers[split].add(tokens, document.num_learned_bytes, mask)
                if split == "held_out" and mask is None:
                    xz.add(document.text.encode())
                advance(len(document.text.encode()))
    splits = {name: writer.split() for name, writer in writers.items()}
    check_splits(corpus, splits)
    Manifest(
        folder=folder,
        fingerprint=fingerprint,
        dtype=dtype,
        vocabulary=vocabulary,
        splits=splits,
        held_out_xz_bits_per_byte=xz.bits_per_byte(),
        has_masks=corpus.has_masks,
        chat_template=corpus.chat_template(vocabulary.folder) if has_dialogues else None,
        num_skipped=skipped.count,
        skipped=tuple(skipped.first),
    ).save()


def split_of(document: Document, holds_out: HoldsOut | None) -> str:
    return "held_out" if holds_out is not None and holds_out(document.id) else "train"


class Skipped:
    """Rows that are wrong: the first of them is raised, or all are counted where that is asked."""

    def __init__(self, corpus: Corpus) -> None:
        self.is_asked = corpus.skips_bad
        self.count = 0
        self.first: list[str] = []

    def note(self, error: ConfigError) -> None:
        if not self.is_asked:
            raise error
        self.count += 1
        if len(self.first) < MOST_REASONS:
            self.first.append(str(error))


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


def check_splits(corpus: Corpus, splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        if split.num_documents == 0:
            remedy = f"add some, or change the share held out ({corpus.held_out_fraction:g})"
            raise ConfigError(
                "data.path", corpus.path, f"leaves no document in the {name} split", remedy
            )


class ShardWriter:
    """One split's tokens, appended to files of ``shard_tokens`` each; a document may span two."""

    def __init__(self, folder: Path, name: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = folder
        self.name = name
        self.shard_tokens = shard_tokens
        self.shards: list[str] = []
        self.starts = array("q")  # of the open shard's documents
        self.num_documents = self.num_tokens = self.num_learned_tokens = self.num_bytes = 0
        self.room = 0  # tokens that the open shard still takes
        self.file: Any = None
        self.sha = hashlib.sha256()

    def add(
        self, tokens: npt.NDArray[Any], num_bytes: int, mask: npt.NDArray[np.uint8] | None = None
    ) -> None:
        """Append one document, of which ``num_bytes`` of text are learned."""
        if self.room == 0:
            self.open_next()
        self.starts.append(self.num_tokens)
        self.num_documents += 1
        self.num_bytes += num_bytes
        # of a stream every token is learned but the very first
        is_first = self.num_documents == 1
        self.num_learned_tokens += len(tokens) - is_first if mask is None else int(mask[1:].sum())
        self.sha.update(tokens.tobytes())
        if mask is not None:
            self.sha.update(mask.tobytes())
        while len(tokens) > self.room:
            room = self.room
            self.append(tokens[:room], None if mask is None else mask[:room])
            tokens, mask = tokens[room:], None if mask is None else mask[room:]
            self.open_next()
        self.append(tokens, mask)

    def append(self, tokens: npt.NDArray[Any], mask: npt.NDArray[np.uint8] | None) -> None:
        self.file.write(tokens.tobytes())
        if mask is not None:
            with open(mask_of(self.folder / self.shards[-1]), "ab") as masks:
                masks.write(mask.tobytes())
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
        tokens = (self.num_tokens, self.num_learned_tokens)
        counts = (self.num_documents, *tokens, self.num_bytes)
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
