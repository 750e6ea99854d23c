"""How much of what is held out stands in the training text as well: copies that a split misses."""

import numpy as np
import numpy.typing as npt

from llmtrain.data.sequences import TokenStream
from llmtrain.data.shards import Manifest

Words = npt.NDArray[np.uint64]

WINDOW = 32  # tokens that have to be the same: about 25 words
STRIDE = 16  # of the windows of the training text: what 48 tokens share is surely found
BLOCK = 2**22  # tokens read at once
MOST_HELD_OUT = (
    2**22
)  # tokens that are looked for, and of the training text that are looked through
MOST_TRAIN = 2**28
BASE = np.uint64(0x9E3779B97F4A7C15)


def overlap_of(manifest: Manifest) -> float:
    """The share of held-out tokens in windows of 32 that the training text has, too.

    Of a large split the first 4M tokens are looked for, in the first 268M of the training text.
    """
    held_out = TokenStream(manifest, "held_out")
    length = min(held_out.num_tokens, MOST_HELD_OUT)
    if length < WINDOW:
        return 0.0
    hashes = hashes_of(held_out.tokens(0, length), 1)
    wanted, of_window = np.unique(hashes, return_inverse=True)
    is_found = np.zeros(len(wanted), dtype=bool)
    train = TokenStream(manifest, "train")
    for start in range(0, min(train.num_tokens, MOST_TRAIN) - WINDOW + 1, BLOCK):
        stop = min(start + BLOCK + WINDOW - STRIDE, train.num_tokens)
        is_found[found_in(wanted, hashes_of(train.tokens(start, stop), STRIDE))] = True
    return covered(is_found[of_window], length)


def hashes_of(tokens: npt.NDArray, stride: int) -> Words:
    """A 64-bit hash of each window of 32 tokens that begins at a multiple of ``stride``."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, WINDOW)[::stride]
    found = np.zeros(len(windows), dtype=np.uint64)
    for column in range(WINDOW):  # a polynomial modulo 2^64
        found = (found + windows[:, column] + np.uint64(1)) * BASE
        found ^= found >> np.uint64(29)
    return found


def found_in(wanted: Words, hashes: Words) -> npt.NDArray[np.int64]:
    """Which of the sorted ``wanted`` are among the hashes."""
    places = np.searchsorted(wanted, hashes)
    places[places == len(wanted)] = 0
    return places[wanted[places] == hashes]


def covered(is_found: npt.NDArray[np.bool_], length: int) -> float:
    """The share of tokens in a window that was found."""
    edges = np.zeros(length + 1, dtype=np.int64)
    starts = np.flatnonzero(is_found)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + WINDOW, -1)
    return float((np.cumsum(edges[:-1]) > 0).mean())
