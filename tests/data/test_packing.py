"""Documents in sequences: nothing lost, nothing twice, hardly any room left, and cuts counted."""

# N documents, B sequences, L length

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from llmtrain.data.packing import best_fit
from llmtrain.data.sequences import NO_LABEL, PackedSequences, open_sequences
from llmtrain.data.shards import Manifest, Split
from llmtrain.data.tokenising import ShardWriter
from llmtrain.data.tokenizer import Vocabulary
from llmtrain.errors import ConfigError

EOS = 0
Ids = npt.NDArray[np.int64]


def log_normal(count: int, longest: int) -> Ids:
    """Lengths as those of real rows: of mean 107, with a long tail."""
    draws = np.random.default_rng(0).lognormal(np.log(70), 0.95, count)
    return np.clip(draws, 1, longest).astype(np.int64)


LENGTHS = {
    "long-tailed": log_normal(5000, 512),
    "full": np.full(7, 512),
    "one": np.array([3]),
    "none": np.array([], dtype=np.int64),
    "halves": np.array([257, 256, 256, 255, 1]),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_each_document_is_packed_once_and_no_sequence_is_overfull(case: str) -> None:
    lengths = LENGTHS[case]
    rows = best_fit(lengths, 512)
    packed = np.concatenate([np.array([], dtype=np.int64), *rows])
    assert sorted(packed.tolist()) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= 512 for row in rows)
    assert [row.tolist() for row in best_fit(lengths, 512)] == [row.tolist() for row in rows]


def test_long_tailed_lengths_fill_at_least_99_percent() -> None:
    lengths = LENGTHS["long-tailed"]
    assert 100 < lengths.mean() < 115
    assert lengths.sum() / (len(best_fit(lengths, 512)) * 512) > 0.99


def test_the_sequence_with_the_least_room_is_taken() -> None:
    rows = best_fit(np.array([6, 7, 3, 4, 1]), 10)
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 3], [1, 2], [4]]


def write(folder: Path, documents: list[tuple[Ids, Ids]], num_each: int = 20) -> Manifest:
    """A split of documents with their masks, so many in each shard."""
    shards = []
    for first in range(0, len(documents), num_each):
        writer = ShardWriter(folder, f"train_{first}")
        for ids_L, mask_L in documents[first : first + num_each]:
            writer.add(ids_L.astype(np.uint16), len(ids_L), mask_L.astype(np.uint8))
        shards.append(writer.close())
    vocabulary = Vocabulary(folder, size=60000, eos_id=EOS, sha="")
    splits = {"train": Split.of(shards, has_masks=True)}
    return Manifest(folder, "", "uint16", vocabulary, splits, None, has_masks=True)


def random_documents(count: int, longest: int) -> list[tuple[Ids, Ids]]:
    """Documents of tokens that no other has; each learns its last token and a random half."""
    chance = np.random.default_rng(1)
    lengths = chance.integers(2, longest, count)
    starts = np.cumsum([1, *lengths[:-1] + 1])  # so that no two documents run on as one
    parts = [start + np.arange(length) for start, length in zip(starts, lengths, strict=True)]
    masks = [chance.random(len(part)) < 0.5 for part in parts]
    for mask in masks:
        mask[-1] = True
    return list(zip(parts, masks, strict=True))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_each", [1, 7, 1000])
def test_each_learned_token_is_a_label_once_behind_its_predecessor(
    tmp_path: Path, packing: bool, num_each: int
) -> None:
    documents = random_documents(50, 33)
    manifest = write(tmp_path, documents, num_each)
    sequences = open_sequences(manifest, "train", 32, packing=packing)
    batch = sequences.batch(range(len(sequences)))
    is_learned_BL = batch["labels"] != NO_LABEL
    labels, inputs = batch["labels"][is_learned_BL], batch["input_ids"][is_learned_BL]
    expected = np.concatenate([ids_L[1:][mask_L[1:]] for ids_L, mask_L in documents])
    assert sorted(labels.tolist()) == expected.tolist()
    assert (inputs == labels - 1).all()
    assert manifest.train.num_learned_tokens == len(labels)
    assert sequences.num_inputs == sum(len(ids_L) - 1 for ids_L, _ in documents)
    assert (sequences.num_cut, sequences.num_left_out) == (0, 0)


def test_positions_restart_with_each_document_and_with_the_filler(tmp_path: Path) -> None:
    sequences = PackedSequences(write(tmp_path, random_documents(50, 33)), "train", 32, True)
    batch = sequences.batch(range(len(sequences)))
    for input_ids_L, position_ids_L in zip(batch["input_ids"], batch["position_ids"], strict=True):
        runs = np.flatnonzero(~follows(input_ids_L))
        expected = [np.arange(length) for length in np.diff([0, *runs + 1, 32])]
        assert position_ids_L.tolist() == np.concatenate(expected).tolist()


def follows(input_ids_L: Ids) -> npt.NDArray[np.bool_]:
    """Whether each token but the first continues what is before it."""
    is_filler_L = input_ids_L == EOS
    runs_on: npt.NDArray[np.bool_] = np.diff(input_ids_L) == 1
    return runs_on | (is_filler_L[1:] & is_filler_L[:-1])


def test_a_row_that_is_too_long_loses_its_end_and_is_left_out_where_no_answer_remains(
    tmp_path: Path,
) -> None:
    ids_L = np.arange(1, 21)
    early_L, late_L = np.isin(ids_L, [4, 19]), np.isin(ids_L, [18, 19])
    short = (np.arange(30, 33), np.array([0, 0, 1]))
    documents = [(ids_L, early_L), (ids_L + 100, late_L), short]
    sequences = PackedSequences(write(tmp_path, documents), "train", 8, packing=False)
    assert (len(sequences), sequences.num_cut, sequences.num_left_out) == (2, 2, 1)
    assert sequences.num_inputs == 8 + 2
    batch = sequences.batch([0, 1])
    assert batch["input_ids"].tolist() == [[*range(1, 9)], [30, 31, *[EOS] * 6]]
    assert [row[row >= 0].tolist() for row in batch["labels"]] == [[4], [32]]
    just_L = np.isin(ids_L, [9])  # the ninth token is the last that eight inputs predict
    (tmp_path / "just").mkdir()
    edge = PackedSequences(write(tmp_path / "just", [(ids_L, just_L)]), "train", 8, packing=False)
    assert edge.batch([0])["labels"][0, -1] == 9


def test_rows_without_any_answer_in_reach_are_refused(tmp_path: Path) -> None:
    ids_L = np.arange(1, 21)
    manifest = write(tmp_path, [(ids_L, ids_L == 20)])
    with pytest.raises(ConfigError, match="^train.seq_len=8 leaves nothing to learn in the train"):
        PackedSequences(manifest, "train", 8, packing=True)


def test_a_padded_batch_is_as_wide_as_its_longest_row(tmp_path: Path) -> None:
    lengths = [3, 9, 5]
    documents = [(np.arange(1, n + 1), np.ones(n)) for n in lengths]
    sequences = PackedSequences(write(tmp_path, documents), "train", 32, packing=False)
    assert sequences.batch([0, 2])["labels"].tolist() == [[2, 3, *[NO_LABEL] * 2], [2, 3, 4, 5]]
    assert sequences.batch([1])["input_ids"].shape == (1, 8)
    assert set(sequences.batch([0])) == {"input_ids", "labels"}


def test_the_prompt_of_a_sample_ends_where_its_answer_begins(tmp_path: Path) -> None:
    document = (np.arange(1, 10), np.array([0, 0, 0, 0, 0, 1, 1, 1, 1]))
    sequences = PackedSequences(write(tmp_path, [document]), "train", 32, packing=True)
    assert sequences.prompt(100).tolist() == [1, 2, 3, 4, 5]
    assert sequences.prompt(2).tolist() == [4, 5]
