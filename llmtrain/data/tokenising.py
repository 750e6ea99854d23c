"""One slice of a corpus as a shard: what a worker does, whatever else is at work."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.cache import make_once
from llmtrain.data.corpus import Corpus, Document, Slice, digest
from llmtrain.data.duplicates import marks_of, num_marks
from llmtrain.data.encoding import Encoder
from llmtrain.data.split import HoldOut
from llmtrain.data.tokenizer import Vocabulary
from llmtrain.errors import ConfigError

FORMAT = 2  # raise it when the files change, so that older shards are not taken for new ones
BATCH_CHARACTERS = 2**20  # encoded at once: the library keeps some 100 bytes for each token
TOKENS_AT_ONCE = 2**23  # that are hashed, so that memory stays small
MOST_REASONS = 10  # of skipped rows are kept; the rest are counted
SPLITS = ("train", "held_out")
TEXT = "held_out.txt"

Advance = Callable[[int], None]


def no_advance(num_bytes: int) -> None:
    """For whoever draws no bar."""


def ignore(error: ConfigError) -> None:
    """A row that is wrong is refused or counted when it is tokenised."""


@dataclass(frozen=True)
class Shard:
    """One file of tokens: ``path`` from the manifest's folder, counts, and a hash of its content.

    ``num_learned_tokens`` have a loss, ``num_bytes`` are those of their text.
    """

    path: str
    num_documents: int
    num_tokens: int
    num_learned_tokens: int
    num_bytes: int
    sha: str


@dataclass(frozen=True)
class Tokenised:
    """What became of a slice: a shard of each split that has documents, and what was left out.

    ``lacks`` counts the documents that did not pass the filter, by what they lack.
    """

    shards: dict[str, Shard]
    num_skipped: int
    skipped: tuple[str, ...]
    has_dialogues: bool
    lacks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Tokenised":
        saved = json.loads((folder / "slice.json").read_text(encoding="utf-8"))
        shards = {name: Shard(**shard) for name, shard in saved["shards"].items()}
        return cls(**saved | {"shards": shards, "skipped": tuple(saved["skipped"])})

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2) + "\n"
        (folder / "slice.json").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Tokenising:
    """All that decides a slice's bytes beside the slice itself.

    ``keeps_text`` leaves the text of held-out documents beside their tokens.
    """

    corpus: Corpus
    vocabulary: Vocabulary
    holds_out: HoldOut | None
    keeps_text: bool
    root: Path  # folder of all shards

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocabulary.size <= 2**16 else "uint32"

    def folder_of(self, slice: Slice) -> Path:
        """Where a slice's shards lie: slices that say the same share them."""
        rule = None if self.holds_out is None else self.holds_out.rule
        how = [FORMAT, self.dtype, self.vocabulary.folder.name, rule]  # named by all of its files
        left_out = sorted(slice.left_out)
        return self.root / digest([*how, *self.corpus.rendering(), *slice.identity, *left_out])

    def tokenised(self, slice: Slice, advance: Advance = no_advance) -> Path:
        """The folder of a slice's shards, filled unless that was done before."""
        return make_once(
            self.folder_of(slice), self.has_all, lambda folder: self.fill(folder, slice, advance)
        )

    def has_all(self, folder: Path) -> bool:
        """Whether a slice was tokenised, and its held-out text kept where that is wanted."""
        if not is_whole(folder):
            return False
        has_text = (folder / TEXT).is_file() or "held_out" not in Tokenised.load(folder).shards
        return has_text or not self.keeps_text or self.corpus.has_masks

    def marked(self, slice: Slice) -> Path:
        """The folder of a slice's marks, by which duplicates are found."""
        how = self.corpus.duplicates
        folder = self.root.parent / "marks" / digest([FORMAT, how.value, *slice.identity])

        def fill(folder: Path) -> None:
            documents = self.corpus.read_slice(slice, self.vocabulary.folder, ignore)
            found = array("Q")
            for document in (each for each in documents if not each.lack):
                found.extend(marks_of(document.text, how))
            marks_NM = np.frombuffer(found, dtype=np.uint64).reshape(-1, num_marks(how))
            np.save(folder / "marks.npy", marks_NM)

        return make_once(folder, lambda folder: (folder / "marks.npy").is_file(), fill)

    def fill(self, folder: Path, slice: Slice, advance: Advance) -> None:
        encode = encoder_of(self.vocabulary, self.dtype)
        skipped = Skipped(self.corpus)
        writers = {name: ShardWriter(folder, name) for name in SPLITS}
        has_dialogues = False
        documents = self.corpus.read_slice(slice, self.vocabulary.folder, skipped.note)
        sound = (each for each in documents if not skipped.lacking(each))
        kept = (each for number, each in enumerate(sound) if number not in slice.left_out)
        for batch in batches(kept, BATCH_CHARACTERS):
            for document, (tokens, mask) in zip(batch, encode(batch), strict=True):
                has_dialogues |= document.is_dialogue
                name = document.split or self.split_of(document)
                writers[name].add(tokens, document.num_learned_bytes, mask)
                if name == "held_out" and self.keeps_text and mask is None:
                    append(folder / TEXT, document.text.encode())
            advance(sum(len(document.text.encode()) for document in batch))
        shards = {name: writer.close() for name, writer in writers.items()}
        found = {name: shard for name, shard in shards.items() if shard.num_documents}
        left_out = (skipped.count, tuple(skipped.first))
        Tokenised(found, *left_out, has_dialogues, dict(skipped.lacks)).save(folder)

    def split_of(self, document: Document) -> str:
        is_held_out = self.holds_out is not None and self.holds_out(document.id)
        return "held_out" if is_held_out else "train"


@lru_cache(maxsize=1)
def encoder_of(vocabulary: Vocabulary, dtype: str) -> Encoder:
    """A worker opens its tokenizer once."""
    return Encoder(vocabulary, np.dtype(dtype))


def is_whole(folder: Path) -> bool:
    """Whether a slice's record is there and every file that it tells of has its size."""
    if not (folder / "slice.json").is_file():
        return False
    return all(has_size(folder, shard) for shard in Tokenised.load(folder).shards.values())


def has_size(folder: Path, shard: Shard) -> bool:
    """Whether a shard's files are there, of the sizes that its counts say."""
    path = folder / shard.path
    index, mask = index_of(path), mask_of(path)
    if not (path.is_file() and index.is_file()):
        return False
    num_bytes = path.stat().st_size
    is_masked = not mask.is_file() or mask.stat().st_size == shard.num_tokens
    return is_masked and num_bytes in (2 * shard.num_tokens, 4 * shard.num_tokens)


def sha_of(folder: Path, shard: Shard, dtype: str) -> str:
    """The hash of what a shard's files hold now: each document's tokens, and then its mask."""
    path, sha = folder / shard.path, hashlib.sha256()
    tokens = np.memmap(path, dtype, "r")
    if not mask_of(path).is_file():
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            sha.update(tokens[start : start + TOKENS_AT_ONCE].data)
        return sha.hexdigest()
    mask = np.memmap(mask_of(path), np.uint8, "r")
    for start, stop in pairwise([*np.load(index_of(path)).tolist(), len(tokens)]):
        sha.update(tokens[start:stop].data)
        sha.update(mask[start:stop].data)
    return sha.hexdigest()


def index_of(shard: Path) -> Path:
    """Beside each shard: where documents start in it, int64."""
    return shard.with_suffix(".npy")


def mask_of(shard: Path) -> Path:
    """Beside a shard of documents that are learned in part: a byte for each token, 1 if it is."""
    return shard.with_suffix(".mask")


class ShardWriter:
    """One split of a slice, document after document."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.bin"
        self.starts = array("q")
        self.num_tokens = self.num_learned_tokens = self.num_bytes = 0
        self.sha = hashlib.sha256()
        self.file: Any = None
        self.masks: Any = None

    def add(
        self, tokens: npt.NDArray[Any], num_bytes: int, mask: npt.NDArray[np.uint8] | None = None
    ) -> None:
        """Append one document, of which ``num_bytes`` of text are learned."""
        self.starts.append(self.num_tokens)
        self.file = self.file or open(self.path, "wb")  # noqa: SIM115  (closed in close)
        self.write(self.file, tokens)
        if mask is not None:
            self.masks = self.masks or open(mask_of(self.path), "wb")  # noqa: SIM115
            self.write(self.masks, mask)
        self.num_tokens += len(tokens)
        self.num_learned_tokens += len(tokens) if mask is None else int(mask[1:].sum())
        self.num_bytes += num_bytes

    def write(self, file: Any, values: npt.NDArray[Any]) -> None:
        content = values.tobytes()
        self.sha.update(content)
        file.write(content)

    def close(self) -> Shard:
        """Write the index, and say what was written."""
        for file in (self.file, self.masks):
            if file is not None:
                file.close()
        if self.starts:
            np.save(index_of(self.path), np.array(self.starts, dtype=np.int64))
        counts = (len(self.starts), self.num_tokens, self.num_learned_tokens, self.num_bytes)
        return Shard(self.path.name, *counts, self.sha.hexdigest())


class Skipped:
    """What is left out. Of rows that are wrong the first is raised, unless they are counted."""

    def __init__(self, corpus: Corpus) -> None:
        self.is_asked = corpus.skips_bad
        self.count = 0
        self.first: list[str] = []
        self.lacks: Counter[str] = Counter()

    def lacking(self, document: Document) -> bool:
        """Whether a document lacks what the filter asks for, which is counted."""
        if document.lack:
            self.lacks[document.lack] += 1
        return bool(document.lack)

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


def append(path: Path, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)
