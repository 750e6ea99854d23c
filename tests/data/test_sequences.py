from pathlib import Path

import numpy as np
import pytest

from llmtrain.data.sequences import NO_LABEL, TokenSequences
from llmtrain.data.shards import Manifest, Split, prepare
from llmtrain.data.tokenising import ShardWriter
from llmtrain.data.tokenizer import Vocabulary
from llmtrain.errors import ConfigError

EOS = 99


def write(folder: Path, lengths: list[int], num_shards: int) -> Manifest:
    """A split of tokens 0, 1, 2, ... in documents of these lengths, dealt to so many shards."""
    stream = np.arange(sum(lengths), dtype=np.uint16)
    documents = np.split(stream, np.cumsum(lengths)[:-1])
    shards = []
    for number, part in enumerate(np.array_split(np.arange(len(documents)), num_shards)):
        writer = ShardWriter(folder, f"train_{number}")
        for index in part:
            writer.add(documents[index], num_bytes=lengths[index])
        shards.append(writer.close())
    vocabulary = Vocabulary(folder, size=100, eos_id=EOS, sha="")
    splits = {"train": Split.of(shards, has_masks=False)}
    return Manifest(folder, "", "uint16", vocabulary, splits, None)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_sequences_read_the_stream_across_shards(tmp_path, num_shards):
    manifest = write(tmp_path, [3, 11, 1, 6], num_shards)
    assert len(manifest.train.shards) == num_shards
    sequences = TokenSequences(manifest, "train", seq_len=4)
    assert len(sequences) == 5
    input_ids_BL, labels_BL = sequences.batch([4, 0, 2]).values()
    assert input_ids_BL.dtype == labels_BL.dtype == np.int64
    assert input_ids_BL.tolist() == [[16, 17, 18, 19], [0, 1, 2, 3], [8, 9, 10, 11]]
    assert labels_BL.tolist() == (input_ids_BL + 1).tolist()


@pytest.mark.parametrize("seq_len", [1, 4, 5, 10, 20, 50])
def test_every_held_out_token_but_the_first_is_predicted_once(tmp_path, seq_len):
    sequences = TokenSequences(write(tmp_path, [3, 11, 1, 6], 3), "train", seq_len, cover_all=True)
    input_ids_BL, labels_BL = sequences.batch(range(len(sequences))).values()
    has_label = labels_BL != NO_LABEL
    assert labels_BL[has_label].tolist() == list(range(1, 21))
    assert input_ids_BL[has_label].tolist() == list(range(20))
    assert set(input_ids_BL[~has_label]) <= {EOS}


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_positions_restart_with_each_document(tmp_path, num_shards):
    manifest = write(tmp_path, [3, 11, 1, 6], num_shards)
    sequences = TokenSequences(manifest, "train", seq_len=6, keep_apart=True, cover_all=True)
    assert sequences.batch([0, 1, 2, 3])["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, 2],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 0, 0, 1, 2],
        [0, 1, 2, 3, 4, 5],
    ]


def test_a_prepared_corpus_reads_back_as_its_tokens(texts, corpus_of, tmp_path):
    manifest = prepare(corpus_of(), tmp_path / "cache")
    stream = np.fromfile(manifest.folder / manifest.held_out.shards[0].path, dtype=manifest.dtype)
    sequences = TokenSequences(manifest, "held_out", seq_len=32, cover_all=True)
    labels_BL = sequences.batch(range(len(sequences)))["labels"]
    assert labels_BL[labels_BL != NO_LABEL].tolist() == stream[1:].tolist()


def test_a_corpus_shorter_than_one_sequence_is_refused(tmp_path):
    manifest = write(tmp_path, [3, 11, 1, 6], 3)
    assert len(TokenSequences(manifest, "train", seq_len=20)) == 1
    with pytest.raises(
        ConfigError, match=r"^train.seq_len=21 needs 22 tokens .* has 21; set it to at most 20"
    ):
        TokenSequences(manifest, "train", seq_len=21)
