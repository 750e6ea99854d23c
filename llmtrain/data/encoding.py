"""Documents as token ids, and as masks of the tokens that are learned."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.corpus import Document
from llmtrain.data.tokenizer import Vocabulary, load

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encoded = tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]  # ids and mask of a document


class Encoder:
    """Documents as token ids, and as masks where they are learned in part.

    The library spreads a batch over all cores.
    """

    def __init__(self, vocabulary: Vocabulary, dtype: np.dtype[Any]) -> None:
        self.eos_id = vocabulary.eos_id
        self.dtype = dtype
        self.plain = load(vocabulary.folder)
        self.marked = load(vocabulary.folder)
        self.marked.encode_special_tokens = False  # those of a chat template are meant

    def __call__(self, batch: list[Document]) -> list[Encoded]:
        if batch[0].learned is None:
            texts = [document.text for document in batch]
            encoded = self.plain.encode_batch_fast(texts, add_special_tokens=False)
            return [(self.array([*encoding.ids, self.eos_id]), None) for encoding in encoded]
        marked = encode_marked(self.marked, batch)
        return [(self.array(ids), mask) for ids, mask in marked]

    def array(self, ids: list[int]) -> npt.NDArray[Any]:
        return np.array(ids, dtype=self.dtype)


def encode_marked(
    tokenizer: "Tokenizer", documents: Sequence[Document]
) -> list[tuple[list[int], npt.NDArray[np.uint8]]]:
    """Token ids of documents that are learned in part, and for each 1 if it is learned.

    A text is encoded apart from where an answer begins, so that no token lies across and a prompt
    alone has the same tokens. But not where the tokenizer would put a space before the answer.
    """
    is_cut = not begins_with_space(tokenizer)
    parts = [cut(document) if is_cut else [(0, document.text)] for document in documents]
    texts = [text for document in parts for _, text in document]
    encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    found = []
    for document, pieces in zip(documents, parts, strict=True):
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for begin, _ in pieces:
            piece = next(encoded)
            ids += piece.ids
            offsets += [(begin + start, begin + stop) for start, stop in piece.offsets]
        found.append((ids, learned_mask(offsets, document.learned or ())))
    return found


def cut(document: Document) -> list[tuple[int, str]]:
    """A document's pieces and where they begin: one more at the start of each learned range."""
    starts = [0, *(start for start, _ in document.learned or () if start > 0)]
    stops = [*starts[1:], len(document.text)]
    return [(start, document.text[start:stop]) for start, stop in zip(starts, stops, strict=True)]


def begins_with_space(tokenizer: "Tokenizer") -> bool:
    """Whether a tokenizer puts a space before each text, as those of SentencePiece may."""
    text = "a" if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str("a")
    if tokenizer.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return text != "a"


def learned_mask(
    offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]
) -> npt.NDArray[np.uint8]:
    """1 for each token whose characters lie in a learned range, in part at least."""
    bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    last = bounds[:, 1]
    first = np.minimum(bounds[:, 0], last - 1)  # a space may have been trimmed off its own token
    mask = np.zeros(len(bounds), dtype=np.uint8)
    for start, stop in spans:
        mask |= (last > start) & (first < stop)
    return mask
