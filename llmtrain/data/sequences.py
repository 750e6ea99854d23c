"""Sequences out of a split's documents, by index, as the arrays of a batch.

B batch, L sequence length.
"""

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.data.packing import best_fit
from llmtrain.data.shards import Manifest, index_of, mask_of
from llmtrain.errors import ConfigError

NO_LABEL = -100  # what torch's cross entropy leaves out

Ids = npt.NDArray[np.int64]


class Sequences(Protocol):
    """What a step or an evaluation reads its micro-batches from.

    ``num_inputs`` counts the tokens that the model reads when every sequence is read once. Of
    documents that are too long, ``num_cut`` lose their end and ``num_left_out`` have nothing
    learned left.
    """

    num_inputs: int
    num_cut: int
    num_left_out: int

    def __len__(self) -> int: ...

    def batch(self, indices: npt.ArrayLike) -> dict[str, Ids]:
        """input_ids and labels [B, L] of these sequences, labels already shifted by one.

        Where a sequence holds several documents that are kept apart, position_ids restart at 0
        with each.
        """

    def prompt(self, num_tokens: int) -> Ids:
        """At most so many token ids that begin the first sequence: something to continue."""


def open_sequences(
    manifest: Manifest,
    split: str,
    seq_len: int,
    keep_apart: bool = False,
    packing: bool = True,
    cover_all: bool = False,
) -> Sequences:
    """The sequences of a split: documents that are learned in part, or windows of a stream."""
    if manifest.has_masks:
        return PackedSequences(manifest, split, seq_len, packing)
    return TokenSequences(manifest, split, seq_len, keep_apart, cover_all)


class TokenStream:
    """All tokens of a split, memory-mapped, whatever shards they lie in."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        files = [manifest.folder / name for name in manifest.splits[split].shards]
        self.num_tokens = manifest.splits[split].num_tokens
        self.shards = [np.memmap(file, dtype=manifest.dtype, mode="r") for file in files]
        self.masks = [np.memmap(mask_of(file), mode="r") for file in files if manifest.has_masks]
        self.starts = [np.load(index_of(file), mmap_mode="r") for file in files]
        self.ends = list(accumulate(len(shard) for shard in self.shards))

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.uint16 | np.uint32]:
        """Tokens ``start`` to ``stop`` of the split."""
        return self.cut(self.shards, start, stop)

    def mask(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """For each of these tokens 1 if it is learned."""
        return self.cut(self.masks, start, stop)

    def cut(self, shards: Sequence[npt.NDArray], start: int, stop: int) -> npt.NDArray:
        parts = []
        for shard in self.shards_between(start, stop):
            offset = self.ends[shard] - len(self.shards[shard])
            parts.append(shards[shard][max(0, start - offset) : stop - offset])
        return np.concatenate(parts)

    def document_starts(self, start: int, stop: int) -> Ids:
        """Offsets in the split of the documents that start from ``start`` to before ``stop``."""
        parts = []
        for shard in self.shards_between(start, stop):
            first, last = np.searchsorted(self.starts[shard], [start, stop])
            parts.append(self.starts[shard][first:last])
        return np.concatenate(parts)

    def shards_between(self, start: int, stop: int) -> range:
        first = bisect.bisect_right(self.ends, start)
        last = bisect.bisect_left(self.ends, stop)
        return range(first, min(last, len(self.ends) - 1) + 1)


class TokenSequences:
    """Sequence ``i`` reads tokens ``i*L`` to ``i*L + L`` and predicts each one's successor.

    The tokens after the last whole sequence are left out, unless ``cover_all``: then one more
    sequence ends the split, filled up with end-of-document tokens that have no label, so that
    every token but the split's first is predicted exactly once.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        seq_len: int,
        keep_apart: bool = False,
        cover_all: bool = False,
    ) -> None:
        self.stream = TokenStream(manifest, split)
        self.seq_len = seq_len
        self.num_cut = self.num_left_out = 0
        self.keep_apart = keep_apart
        self.eos_id = manifest.vocabulary.eos_id
        self.num_tokens = self.stream.num_tokens
        self.num_sequences = count_sequences(self.num_tokens, seq_len, cover_all)
        self.num_inputs = min(self.num_sequences * seq_len, self.num_tokens - 1)
        if self.num_sequences == 0:
            raise too_short(split, self.num_tokens, seq_len)

    def __len__(self) -> int:
        return self.num_sequences

    def batch(self, indices: npt.ArrayLike) -> dict[str, Ids]:
        starts = self.first_tokens(indices)
        input_ids_BL = np.full((len(starts), self.seq_len), self.eos_id, dtype=np.int64)
        labels_BL = np.full_like(input_ids_BL, NO_LABEL)
        for row, start in enumerate(starts):
            tokens = self.stream.tokens(start, min(start + self.seq_len + 1, self.num_tokens))
            input_ids_BL[row, : len(tokens) - 1] = tokens[:-1]
            labels_BL[row, : len(tokens) - 1] = tokens[1:]
        arrays = {"input_ids": input_ids_BL, "labels": labels_BL}
        return arrays | ({"position_ids": self.position_ids(starts)} if self.keep_apart else {})

    def prompt(self, num_tokens: int) -> Ids:
        return self.batch([0])["input_ids"][0, :num_tokens]

    def position_ids(self, starts: list[int]) -> Ids:
        """position_ids_BL that restart at 0 with each sequence and each document within it."""
        offsets_L = np.arange(self.seq_len, dtype=np.int64)
        latest_BL = np.zeros((len(starts), self.seq_len), dtype=np.int64)
        for row, start in enumerate(starts):
            documents = self.stream.document_starts(start, start + self.seq_len) - start
            latest_BL[row, documents] = documents
        return offsets_L - np.maximum.accumulate(latest_BL, axis=1)

    def first_tokens(self, indices: npt.ArrayLike) -> list[int]:
        """Where these sequences start in the split's stream."""
        chosen = np.asarray(indices, dtype=np.int64)
        assert ((chosen >= 0) & (chosen < len(self))).all()
        return [int(index) * self.seq_len for index in chosen]


class PackedSequences:
    """Documents that are learned in part: several in a sequence, or each in one of its own.

    A document of more than L + 1 tokens loses its end; one that has nothing learned left is left
    out. Packed, a sequence of L tokens holds the documents that :func:`best_fit` gave it, and its
    rest is filler without labels. Else a batch is as wide as its longest document.
    """

    def __init__(self, manifest: Manifest, split: str, seq_len: int, packing: bool) -> None:
        self.stream = TokenStream(manifest, split)
        self.seq_len = seq_len
        self.packing = packing
        self.eos_id = manifest.vocabulary.eos_id
        bounds = np.concatenate([*self.stream.starts, [self.stream.num_tokens]])
        self.starts, lengths = bounds[:-1], np.diff(bounds) - 1
        self.lengths = np.minimum(lengths, seq_len)
        is_cut = lengths > seq_len
        is_learned = np.ones(len(lengths), dtype=bool)
        is_learned[is_cut] = [
            self.labels(int(index)).max() >= 0 for index in np.flatnonzero(is_cut)
        ]
        self.num_cut = int(is_cut.sum())
        self.num_left_out = int((~is_learned).sum())
        kept = np.flatnonzero(is_learned)
        if not len(kept):
            reason = f"leaves nothing to learn in the {split} split: every answer begins later"
            raise ConfigError("train.seq_len", seq_len, reason, "raise it")
        self.num_inputs = int(self.lengths[kept].sum())
        if packing:
            self.rows = [kept[row] for row in best_fit(self.lengths[kept], seq_len)]
        else:
            self.rows = list(kept[:, None])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: npt.ArrayLike) -> dict[str, Ids]:
        rows = [self.rows[index] for index in np.asarray(indices, dtype=np.int64)]
        width = self.seq_len if self.packing else max(self.lengths[row[0]] for row in rows)
        shape = (len(rows), width)
        input_ids_BL = np.full(shape, self.eos_id, dtype=np.int64)
        labels_BL = np.full(shape, NO_LABEL, dtype=np.int64)
        position_ids_BL = np.zeros(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            begin = 0
            for document in row:
                end = begin + self.lengths[document]
                input_ids_BL[number, begin:end] = self.inputs(document)
                labels_BL[number, begin:end] = self.labels(document)
                position_ids_BL[number, begin:end] = np.arange(end - begin)
                begin = end
            position_ids_BL[number, begin:] = np.arange(width - begin)
        arrays = {"input_ids": input_ids_BL, "labels": labels_BL}
        return arrays | ({"position_ids": position_ids_BL} if self.packing else {})

    def prompt(self, num_tokens: int) -> Ids:
        """The last tokens before the first answer of the first document."""
        document = self.rows[0][0]
        first_label = int(np.argmax(self.labels(document) >= 0))
        return self.inputs(document)[: first_label + 1][-num_tokens:]

    def inputs(self, document: int) -> Ids:
        """The tokens of a document that are read: all that fit, but for the very last."""
        start = int(self.starts[document])
        return self.stream.tokens(start, start + int(self.lengths[document])).astype(np.int64)

    def labels(self, document: int) -> Ids:
        """For each token that is read its successor, where that is learned."""
        start = int(self.starts[document]) + 1
        stop = start + int(self.lengths[document])
        tokens = self.stream.tokens(start, stop).astype(np.int64)
        return np.where(self.stream.mask(start, stop), tokens, NO_LABEL)


def count_sequences(num_tokens: int, seq_len: int, cover_all: bool = False) -> int:
    """How many sequences so many tokens give: each but the first token is predicted once."""
    predicted = max(0, num_tokens - 1)
    return -(-predicted // seq_len) if cover_all else predicted // seq_len


def too_short(split: str, num_tokens: int, seq_len: int) -> ConfigError:
    return ConfigError(
        "train.seq_len",
        seq_len,
        f"needs {seq_len + 1} tokens and the {split} split has {num_tokens}",
        f"set it to at most {max(1, num_tokens - 1)} or add data",
    )
