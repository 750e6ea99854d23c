"""Which documents are held out: decided by each one's id, never by its position."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from llmtrain.data.corpus import Corpus
from llmtrain.errors import ConfigError

HoldsOut = Callable[[str], bool]


def hash_of(document_id: str) -> int:
    """A 64-bit number that depends on the id alone."""
    sha = hashlib.sha256(document_id.encode("utf-8", "surrogateescape"))
    return int.from_bytes(sha.digest()[:8], "big")


@dataclass(frozen=True)
class HoldOut:
    """The rule by which a corpus is split: that of its kind, but for one document.

    ``least`` is the hash of the one that is held out where else none were, ``most`` of the one that
    is not where else all were.
    """

    corpus: Corpus
    least: int | None = None
    most: int | None = None

    def __call__(self, document_id: str) -> bool:
        hashed = hash_of(document_id)
        if self.least is not None:
            return hashed == self.least
        return hashed != self.most if self.most is not None else self.corpus.holds_out(hashed)

    @property
    def rule(self) -> tuple[object, ...]:
        """What tells it from other rules."""
        return self.corpus.held_out_fraction, self.least, self.most


def hold_out(corpus: Corpus) -> HoldOut:
    """The rule of a corpus, which leaves neither side empty.

    Where that of its kind holds out nothing, as it may with few documents, the id of smallest hash
    is held out; where it holds out everything, all but the one of greatest hash. ConfigError for a
    corpus of fewer than two documents. One whose files are fetched has enough of them.
    """
    if corpus.is_fetched:
        return HoldOut(corpus)
    hashes: set[int] = set()  # as many as it takes to see both sides
    sides: set[bool] = set()
    for document_id in corpus.ids():
        hashes.add(hash_of(document_id))
        sides.add(corpus.holds_out(hash_of(document_id)))
        if len(sides) == 2:
            return HoldOut(corpus)
    if len(hashes) < 2:
        raise too_few(corpus)
    return (
        HoldOut(corpus, most=max(hashes)) if True in sides else HoldOut(corpus, least=min(hashes))
    )


def too_few(corpus: Corpus) -> ConfigError:
    what, remedy = "documents", "add some (a text file above 64 KiB counts as several)"
    if corpus.filters:
        what, remedy = "documents that pass data.filter", "ask less of them, or add some"
    if corpus.has_masks:
        what, remedy = "rows", "add some, or give others to hold out: data.validation_path"
    reason = f"holds fewer than two different {what}, and one must be held out"
    return ConfigError("data.path", corpus.path, reason, remedy)
