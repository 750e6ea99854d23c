"""Documents that are said twice: marks of each slice, and which documents they leave out.

Exact copies share the hash of their text, near ones a band of their MinHash signature (Broder 1997;
Leskovec, Rajaraman and Ullman 2014, "Mining of Massive Datasets", section 3.4). Of documents that
share one the first stays. Memory is that of one mark of each document.
"""

# N documents, M marks of each

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.corpus import Deduplicate
from llmtrain.data.split import hash_of

SHINGLE_WORDS = 5
NUM_BANDS, BAND_ROWS = 9, 13  # half of all pairs are found at a similarity of (1/9)^(1/13) = 0.84
HAN = r"\u3040-\u30ff\u4e00-\u9fff"  # scripts without spaces: a character is a word
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+")
SEED = 1

Marks = npt.NDArray[np.uint64]


def marks_of(text: str, how: Deduplicate) -> list[int]:
    """What a document shares with its duplicates: a hash of its text, and of each band."""
    exact = [hash_of(text)]
    return exact if how is Deduplicate.exact else [*exact, *bands_of(text)]


def num_marks(how: Deduplicate) -> int:
    return 1 if how is Deduplicate.exact else 1 + NUM_BANDS


def bands_of(text: str) -> list[int]:
    """A hash of each band of a text's MinHash signature, over runs of five words."""
    signature = permutations().copy()
    signature.update_batch(list(shingles(text)))
    rows = signature.hashvalues[: NUM_BANDS * BAND_ROWS].reshape(NUM_BANDS, BAND_ROWS)
    return [hash_of(f"{number}:{row.tobytes().hex()}") for number, row in enumerate(rows)]


@lru_cache(maxsize=1)
def permutations() -> Any:
    """An empty signature, whose random permutations all share."""
    from datasketch import MinHash

    return MinHash(num_perm=NUM_BANDS * BAND_ROWS, seed=SEED)


def shingles(text: str) -> Iterator[bytes]:
    """Runs of five words in lower case; a text of fewer as it stands."""
    words = WORD.findall(text.lower())
    if len(words) < SHINGLE_WORDS:
        yield text.encode()
    for first in range(len(words) - SHINGLE_WORDS + 1):
        yield " ".join(words[first : first + SHINGLE_WORDS]).encode()


def repeated(files: Sequence[Path]) -> list[npt.NDArray[np.int64]]:
    """For the file of marks [N, M] of each slice, the documents that an earlier one is like."""
    shapes = [np.load(file, mmap_mode="r").shape for file in files]
    ends = np.cumsum([count for count, _ in shapes])
    is_out = np.zeros(int(ends[-1]), dtype=bool)
    for column in range(shapes[0][1]):  # one of all files at once, and no file is kept open
        marks = [np.array(np.load(file, mmap_mode="r")[:, column]) for file in files]
        is_out |= is_repeated(np.concatenate(marks))
    parts = np.split(is_out, ends[:-1])
    return [np.flatnonzero(part) for part in parts]


def is_repeated(marks_N: Marks) -> npt.NDArray[np.bool_]:
    """Whether an earlier one is the same."""
    order_N = np.argsort(marks_N, kind="stable")
    ordered_N = marks_N[order_N]
    found_N = np.zeros(len(marks_N), dtype=bool)
    found_N[order_N[1:]] = ordered_N[1:] == ordered_N[:-1]
    return found_N
