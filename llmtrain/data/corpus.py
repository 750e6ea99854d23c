"""What every source of text shares: the config group ``data``."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.schema import Part, unlearned

BYTES_PER_TOKEN = 3.5  # English and source code under a small BPE; only estimates rest on it
SMALLEST_BPE = 257  # 256 bytes and the end-of-document token
MANDATORY: Any = "???"  # OmegaConf's mark of a value that a YAML file must give


@dataclass(frozen=True)
class Document:
    """One text and the name it keeps for ever, which decides whether it is held out."""

    id: str
    text: str


@dataclass
class Tokenizer:
    """The folder or hub name of a tokenizer, or null to train one of ``vocab_size`` entries."""

    path: str | None = None
    vocab_size: int | None = MANDATORY


@dataclass
class Corpus(Part, ABC):
    """Documents of text, a tokenizer for them, and a rule for which of them are held out.

    One document in ``held_out_every`` is held out, by a hash of its id, so that a document stays
    on its side when others come and go. ``keep_documents_apart`` restarts the positions at each
    document within a sequence.
    """

    name: str = unlearned("???")
    path: str | None = unlearned()
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    held_out_every: int = MANDATORY
    keep_documents_apart: bool = False

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, always in the same order; ConfigError for one that cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the source is, found without tokenising anything."""

    @abstractmethod
    def num_bytes(self) -> int:
        """About how many bytes of text there are, found without reading them."""

    def check(self) -> None:
        """Refuse in milliseconds, with a ConfigError, what could not be prepared."""
        check_held_out(self.held_out_every)
        check_tokenizer(self.tokenizer)

    def estimate_tokens(self) -> int:
        """About how many training tokens there will be, while no manifest says it exactly."""
        share = 1 - 1 / self.held_out_every
        return int(self.num_bytes() / BYTES_PER_TOKEN * share)


def check_held_out(every: int) -> None:
    if every < 2:
        raise ConfigError(
            "data.held_out_every",
            every,
            "leaves no document to train on",
            "set 2 or more (20 holds out 5 %)",
        )


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
