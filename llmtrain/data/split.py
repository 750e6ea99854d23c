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
    """The rule by which this corpus is split: one id in ``held_out_every``.

    Where that holds out nothing, as it may with few documents, it is the one id of smallest hash.
    ConfigError for a corpus of fewer than two documents.
    """
    lowest: list[int] = []
    for document in corpus.documents():
        hashed = hash_of(document.id)
        if hashed % corpus.held_out_every == 0:
            return lambda document_id: hash_of(document_id) % corpus.held_out_every == 0
        lowest = sorted([*lowest, hashed])[:2]
    if len(lowest) < 2:
        raise too_few(corpus)
    return lambda document_id: hash_of(document_id) == lowest[0]


def too_few(corpus: Corpus) -> ConfigError:
    return ConfigError(
        "data.path",
        corpus.path,
        "holds fewer than two documents, and one must be held out",
        "add documents (a text file above 64 KiB counts as several)",
    )
