"""Which documents are held out: decided by each one's id, never by its position."""

import hashlib
from collections.abc import Callable

from llmtrain.data.corpus import Corpus
from llmtrain.errors import ConfigError

HoldsOut = Callable[[str], bool]


def hash_of(document_id: str) -> int:
    """A 64-bit number that depends on the id alone."""
    sha = hashlib.sha256(document_id.encode("utf-8", "surrogateescape"))
    return int.from_bytes(sha.digest()[:8], "big")


def hold_out(corpus: Corpus) -> HoldsOut:
    """The rule by which this corpus is split: that of its kind, unless it leaves a side empty.

    Where it holds out nothing, as it may with few documents, the id of smallest hash is held out;
    where it holds out everything, all but the one of greatest hash. ConfigError for a corpus of
    fewer than two documents.
    """
    hashes: set[int] = set()  # as many as it takes to see both sides
    sides: set[bool] = set()
    for document_id in corpus.ids():
        hashes.add(hash_of(document_id))
        sides.add(corpus.holds_out(hash_of(document_id)))
        if len(sides) == 2:
            return lambda document_id: corpus.holds_out(hash_of(document_id))
    if len(hashes) < 2:
        raise too_few(corpus)
    least, most = min(hashes), max(hashes)
    if True in sides:
        return lambda document_id: hash_of(document_id) != most
    return lambda document_id: hash_of(document_id) == least


def too_few(corpus: Corpus) -> ConfigError:
    what, remedy = "documents", "add some (a text file above 64 KiB counts as several)"
    if corpus.has_masks:
        what, remedy = "rows", "add some, or give others to hold out: data.validation_path"
    reason = f"holds fewer than two different {what}, and one must be held out"
    return ConfigError("data.path", corpus.path, reason, remedy)
