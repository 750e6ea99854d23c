"""Sequences of equal length out of a split's stream of tokens.

B batch, L sequence length.
"""

import bisect
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from llmtrain.data.shards import Manifest, index_of
from llmtrain.errors import ConfigError

NO_LABEL = -100  # what torch's cross entropy leaves out

Ids = npt.NDArray[np.int64]


class TokenSequences:
    """Sequence ``i`` reads tokens ``i*L`` to ``i*L + L`` and predicts each one's successor.

    The tokens after the last whole sequence are left out, unless ``cover_all``: then one more
    sequence ends the split, filled up with end-of-document tokens that have no label, so that
    every token but the split's first is predicted exactly once. Shards are memory-mapped.
    """

    def __init__(
        self, manifest: Manifest, split: str, seq_len: int, cover_all: bool = False
    ) -> None:
        files = [manifest.folder / name for name in manifest.splits[split].shards]
        self.seq_len = seq_len
        self.eos_id = manifest.vocabulary.eos_id
        self.num_tokens = manifest.splits[split].num_tokens
        self.shards = [np.memmap(file, dtype=manifest.dtype, mode="r") for file in files]
        self.starts = [np.load(index_of(file), mmap_mode="r") for file in files]
        self.ends = list(accumulate(len(shard) for shard in self.shards))
        self.num_sequences = count_sequences(self.num_tokens, seq_len, cover_all)
        if self.num_sequences == 0:
            raise too_short(split, self.num_tokens, seq_len)

    def __len__(self) -> int:
        return self.num_sequences

    def read(self, indices: npt.ArrayLike) -> tuple[Ids, Ids]:
        """input_ids_BL and labels_BL of these sequences; labels are already shifted by one."""
        starts = self.first_tokens(indices)
        input_ids_BL = np.full((len(starts), self.seq_len), self.eos_id, dtype=np.int64)
        labels_BL = np.full_like(input_ids_BL, NO_LABEL)
        for row, start in enumerate(starts):
            tokens = self.tokens(start, min(start + self.seq_len + 1, self.num_tokens))
            input_ids_BL[row, : len(tokens) - 1] = tokens[:-1]
            labels_BL[row, : len(tokens) - 1] = tokens[1:]
        return input_ids_BL, labels_BL

    def position_ids(self, indices: npt.ArrayLike) -> Ids:
        """position_ids_BL that restart at 0 with each sequence and each document within it."""
        starts = self.first_tokens(indices)
        offsets_L = np.arange(self.seq_len, dtype=np.int64)
        latest_BL = np.zeros((len(starts), self.seq_len), dtype=np.int64)
        for row, start in enumerate(starts):
            documents = self.document_starts(start, start + self.seq_len) - start
            latest_BL[row, documents] = documents
        return offsets_L - np.maximum.accumulate(latest_BL, axis=1)

    def first_tokens(self, indices: npt.ArrayLike) -> list[int]:
        """Where these sequences start in the split's stream."""
        chosen = np.asarray(indices, dtype=np.int64)
        assert ((chosen >= 0) & (chosen < len(self))).all()
        return [int(index) * self.seq_len for index in chosen]

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.uint16 | np.uint32]:
        """Tokens ``start`` to ``stop`` of the split, whatever shards they lie in."""
        parts = []
        for shard in self.shards_between(start, stop):
            offset = self.ends[shard] - len(self.shards[shard])
            parts.append(self.shards[shard][max(0, start - offset) : stop - offset])
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
