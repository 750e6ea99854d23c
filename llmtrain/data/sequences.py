"""Sequences out of a split's documents, by index, as the arrays of a batch.

B batch, L sequence length.
"""

import bisect
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.data.mixing import Mixing
from llmtrain.data.order import own_order, step_sequences
from llmtrain.data.packing import best_fit
from llmtrain.data.shards import Manifest
from llmtrain.data.tokenising import index_of, mask_of
from llmtrain.errors import ConfigError

NO_LABEL = -100  # what torch's cross entropy leaves out

MOST_OPEN = 64  # files, each with a handle

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

    def order(self, seed: int, step: int, global_batch: int) -> Ids:
        """The sequences of a step (from 0), on however many ranks; shape [global_batch]."""

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
    if split == "train" and manifest.sources:
        return MixedSequences(manifest, seq_len, keep_apart)
    return TokenSequences(manifest, split, seq_len, keep_apart, cover_all)


class TokenStream:
    """All tokens of a split, memory-mapped, whatever shards they lie in.

    The few shards that were read last are open: of a large corpus there are thousands.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.dtype = manifest.dtype
        shards = manifest.splits[split].shards
        self.files = [manifest.folder / shard.path for shard in shards]
        self.num_tokens = manifest.splits[split].num_tokens
        self.ends = list(accumulate(shard.num_tokens for shard in shards))
        self.opened = lru_cache(maxsize=MOST_OPEN)(np.memmap)
        self.starts_in = lru_cache(maxsize=MOST_OPEN)(self.read_starts)

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.uint16 | np.uint32]:
        """Tokens ``start`` to ``stop`` of the split."""
        parts = self.cut(start, stop)
        opened = ((self.opened(file, self.dtype, "r"), within) for file, within in parts)
        return np.concatenate([shard[within] for shard, within in opened])

    def mask(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """For each of these tokens 1 if it is learned."""
        parts = self.cut(start, stop)
        opened = ((self.opened(mask_of(file), "uint8", "r"), within) for file, within in parts)
        return np.concatenate([shard[within] for shard, within in opened])

    def cut(self, start: int, stop: int) -> Iterator[tuple[Path, slice]]:
        """The shards that have these tokens, and where."""
        for shard in self.shards_between(start, stop):
            begin = self.begin(shard)
            yield self.files[shard], slice(max(0, start - begin), stop - begin)

    def document_starts(self, start: int, stop: int) -> Ids:
        """Offsets in the split of the documents that start from ``start`` to before ``stop``."""
        parts = []
        for shard in self.shards_between(start, stop):
            starts = self.starts_in(shard)
            first, last = np.searchsorted(starts, [start, stop])
            parts.append(starts[first:last])
        return np.concatenate(parts)

    def read_starts(self, shard: int) -> Ids:
        """Where documents start that a shard has, as offsets in the split."""
        return np.load(index_of(self.files[shard])) + self.begin(shard)

    def begin(self, shard: int) -> int:
        return self.ends[shard - 1] if shard else 0

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

    def order(self, seed: int, step: int, global_batch: int) -> Ids:
        return step_sequences(seed, step, global_batch, len(self))

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


class MixedSequences(TokenSequences):
    """The training sequences of several sources, in their shares at every step.

    No sequence spans two sources. Each source has epochs of its own, and an order of its own in
    each. ``num_draws`` is how many sequences there are until the run is to end; None: no end.
    """

    def __init__(self, manifest: Manifest, seq_len: int, keep_apart: bool = False) -> None:
        super().__init__(manifest, "train", seq_len, keep_apart)
        tokens = [source.num_tokens for source in manifest.sources]
        for source in manifest.sources:
            if count_sequences(source.num_tokens, seq_len) == 0:
                raise too_short(f"training text of {source.name}", source.num_tokens, seq_len)
        self.sizes = [count_sequences(each, seq_len) for each in tokens]
        self.first_token = np.cumsum([0, *tokens[:-1]])
        self.first_index = np.cumsum([0, *self.sizes])
        self.num_sequences = sum(self.sizes)
        self.num_inputs = self.num_sequences * seq_len
        self.mixing = Mixing([source.share for source in manifest.sources])
        ends = manifest.ends_when_dry
        self.num_draws = self.mixing.until_dry(self.sizes) if ends else None

    def order(self, seed: int, step: int, global_batch: int) -> Ids:
        numbers = step * global_batch + np.arange(global_batch, dtype=np.int64)
        sources, draws = self.mixing.draws(numbers)
        found = np.empty(global_batch, dtype=np.int64)
        for source, size in enumerate(self.sizes):
            is_own = sources == source
            own = own_order(seed, source, draws[is_own], size)
            found[is_own] = self.first_index[source] + own
        return found

    def first_tokens(self, indices: npt.ArrayLike) -> list[int]:
        chosen = np.asarray(indices, dtype=np.int64)
        sources = np.searchsorted(self.first_index, chosen, side="right") - 1
        within = chosen - self.first_index[sources]
        return [int(token) for token in self.first_token[sources] + within * self.seq_len]


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
        found = [self.stream.starts_in(shard) for shard in range(len(self.stream.files))]
        bounds = np.concatenate([*found, [self.stream.num_tokens]])
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

    def order(self, seed: int, step: int, global_batch: int) -> Ids:
        return step_sequences(seed, step, global_batch, len(self))

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
