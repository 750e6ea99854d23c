"""What every source of text shares: the config group ``data``."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from llmtrain.errors import ConfigError
from llmtrain.schema import Part, unlearned

BYTES_PER_TOKEN = 3.5  # English and source code under a small BPE; only estimates rest on it
PERIOD = 4096  # draws from a mixture: shares are held to the nearest of so many parts
SMALLEST_BPE = 257  # 256 bytes and the end-of-document token
MANDATORY: Any = "???"  # OmegaConf's mark of a value that a YAML file must give

OnBad = Callable[[ConfigError], None]  # raises what it is given, or counts it


class OnBadRow(Enum):
    """What is done with a row that is wrong: it is refused, or left out and counted."""

    fail = "fail"
    skip = "skip"


class Deduplicate(Enum):
    """Which documents are left out: none, copies of earlier ones, or those much like one, too."""

    none = "none"
    exact = "exact"
    near = "near"


@dataclass(frozen=True)
class Document:
    """One text and the id it keeps for ever, which decides whether it is held out.

    ``learned`` are the character ranges whose tokens have a loss; None: all of them, and the
    end-of-document token that is put behind the text. ``split`` names the side of a document whose
    source decides it. ``is_dialogue`` says that a chat template wrote it. ``place`` says where it
    was read, if its id does not. ``lack`` says why it is left out, where it is.
    """

    id: str
    text: str
    learned: tuple[tuple[int, int], ...] | None = None
    split: str | None = None
    is_dialogue: bool = False
    place: str = ""
    lack: str = ""

    @property
    def num_learned_bytes(self) -> int:
        """How many bytes of the text have a loss."""
        if self.learned is None:
            return len(self.text.encode())
        return sum(len(self.text[start:stop].encode()) for start, stop in self.learned)


@dataclass(frozen=True)
class Slice:
    """What is tokenised by itself, of about ``num_bytes`` of text.

    ``identity`` is all that decides which documents it has: equal ones have the same.
    ``content`` tells the source what to read, ``source`` which one of a mixture it is of.
    ``left_out`` are the numbers of documents that earlier ones say already.
    """

    identity: tuple[object, ...]
    num_bytes: int
    content: Any = None
    source: str = ""
    left_out: frozenset[int] = frozenset()


@dataclass
class Tokenizer:
    """The folder or hub name of a tokenizer, or null to train one of ``vocab_size`` entries."""

    path: str | None = None
    vocab_size: int | None = MANDATORY


@dataclass
class Corpus(Part, ABC):
    """Documents, a tokenizer for them, and a rule for which of them are held out.

    ``has_masks`` says whether documents are learned in part. ``num_workers`` processes tokenise it
    (null: one a core).
    """

    name: str = unlearned("???")
    path: str | None = unlearned()
    num_workers: int | None = unlearned(low=1)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)

    has_masks: ClassVar[bool] = False

    @property
    def packs(self) -> bool:
        """Whether a sequence holds several documents."""
        return True

    @property
    def keeps_apart(self) -> bool:
        """Whether a document is read without those before it in its sequence."""
        return False

    @property
    def skips_bad(self) -> bool:
        """Whether a row that is wrong is left out and counted."""
        return False

    @property
    def filters(self) -> bool:
        """Whether documents are left out for what they are like."""
        return False

    @property
    def is_fetched(self) -> bool:
        """Whether a file is fetched for every document that is looked at."""
        return False

    def raise_unless_skipped(self, error: ConfigError) -> None:
        """What is done with a bad row where nobody counts them."""
        if not self.skips_bad:
            raise error

    @property
    @abstractmethod
    def held_out_fraction(self) -> float:
        """The share of documents that is held out."""

    @abstractmethod
    def holds_out(self, hashed: int) -> bool:
        """Whether a document is held out, by the 64-bit hash of its id."""

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """The id of every document that the hash decides about, always in the same order."""

    @abstractmethod
    def written(self, tokenizer: Path, on_bad: OnBad) -> Iterator[Document]:
        """Every document as text for the tokenizer of this folder, always in the same order.

        One that cannot be read goes to ``on_bad``.
        """

    def slices(self) -> Iterator[Slice]:
        """What is tokenised by itself, in the order of the documents: one slice has them all."""
        yield Slice((self.fingerprint(),), self.num_bytes())

    def read_slice(self, slice: Slice, tokenizer: Path, on_bad: OnBad) -> Iterator[Document]:
        """The documents of a slice, as :meth:`written` has them."""
        return self.written(tokenizer, on_bad)

    def shares(self, tokens: dict[str, int]) -> dict[str, float]:
        """Of a mixture, the part of all tokens that each source has, given how many it holds."""
        return {}

    @property
    def ends_when_dry(self) -> bool:
        """Whether a run ends where a source of a mixture has been read."""
        return False

    @property
    def duplicates(self) -> Deduplicate:
        """Which documents are left out since an earlier one says the same."""
        return Deduplicate.none

    def rendering(self) -> list[str]:
        """What beside the source decides how each document is written."""
        return []

    def writing(self) -> list[str]:
        """What beside the source decides which documents are written, and how."""
        return self.rendering()

    def chat_template(self, tokenizer: Path) -> str | None:
        """The template by which dialogues were written, for whoever talks to the model."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the source is, found without tokenising anything."""

    @abstractmethod
    def num_bytes(self) -> int:
        """About how many bytes of text there are, found without reading them."""

    def check(self) -> None:
        """Refuse in milliseconds, with a ConfigError, what could not be prepared."""
        check_tokenizer(self.tokenizer)

    def estimate_tokens(self) -> int:
        """About how many training tokens there will be, while no manifest says it exactly."""
        return int(self.num_bytes() / BYTES_PER_TOKEN * (1 - self.held_out_fraction))


@dataclass
class TextCorpus(Corpus):
    """Documents that are learned whole, as one stream.

    One document in ``held_out_every`` is held out, so that a document stays on its side when
    others come and go. ``keep_documents_apart`` restarts the positions at each document within a
    sequence. ``deduplicate`` leaves out what was said before.
    """

    held_out_every: int = MANDATORY
    keep_documents_apart: bool = False
    deduplicate: Deduplicate = Deduplicate.none

    @property
    def keeps_apart(self) -> bool:
        return self.keep_documents_apart

    @property
    def duplicates(self) -> Deduplicate:
        return self.deduplicate

    def writing(self) -> list[str]:
        return [*self.rendering(), self.deduplicate.value]

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, always in the same order; ConfigError for one that cannot be read."""

    def written(self, tokenizer: Path, on_bad: OnBad) -> Iterator[Document]:
        return self.documents()

    def samples(self) -> list[Slice]:
        """The slices from which a tokenizer learns: all, of which it reads the starts."""
        return list(self.slices())

    def ids(self) -> Iterator[str]:
        return (document.id for document in self.documents())

    def holds_out(self, hashed: int) -> bool:
        return hashed % self.held_out_every == 0

    @property
    def held_out_fraction(self) -> float:
        return 1 / self.held_out_every

    def check(self) -> None:
        super().check()
        check_held_out(self.held_out_every)
        check_deduplicate(self.deduplicate)


def check_held_out(every: int) -> None:
    if every < 2:
        raise ConfigError(
            "data.held_out_every",
            every,
            "leaves no document to train on",
            "set 2 or more (20 holds out 5 %)",
        )


def check_deduplicate(asked: Deduplicate) -> None:
    if asked is Deduplicate.near and find_spec("datasketch") is None:
        remedy = "run: pip install -c constraints.txt datasketch, or take exact"
        raise ConfigError("data.deduplicate", "near", "needs the package datasketch", remedy)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    if tokenizer.path is not None:
        check_tokenizer_path(tokenizer.path)
    elif tokenizer.vocab_size is not None and tokenizer.vocab_size < SMALLEST_BPE:
        raise ConfigError(
            "data.tokenizer.vocab_size",
            tokenizer.vocab_size,
            "has no room for the 256 bytes and the end-of-document token",
            f"set {SMALLEST_BPE} or more",
        )


def check_tokenizer_path(path: str) -> None:
    """Refuse a path that can only be a folder and is none; a hub name is tried when fetched."""
    if path.startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
        raise ConfigError(
            "data.tokenizer.path",
            path,
            "is not a folder",
            "give a tokenizer's folder or hub name, or null to train one",
        )


def digest(parts: Iterable[object]) -> str:
    """16 hex digits that stand for these values in this order."""
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        sha.update(len(data).to_bytes(8, "big"))  # so that "ab", "c" is not "a", "bc"
        sha.update(data)
    return sha.hexdigest()[:16]
