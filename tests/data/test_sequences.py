from pathlib import Path

import numpy as np
import pytest

from llmtrain.data.sequences import NO_LABEL, TokenSequences
from llmtrain.data.shards import Manifest, ShardWriter, prepare
from llmtrain.data.tokenizer import Vocabulary
from llmtrain.errors import ConfigError

EOS = 99


def write(folder: Path, lengths: list[int], shard_tokens: int) -> Manifest:
    """A split of tokens 0, 1, 2, ... in documents of these lengths."""
    stream = np.arange(sum(lengths), dtype=np.uint16)
    with ShardWriter(folder, "train", shard_tokens) as writer:
        for document in np.split(stream, np.cumsum(lengths)[:-1]):
            writer.add(document, num_bytes=len(document))
    vocabulary = Vocabulary(folder, size=100, eos_id=EOS, sha="")
    return Manifest(folder, "", "uint16", vocabulary, {"train": writer.split()}, None)


@pytest.mark.parametrize("shard_tokens", [1, 4, 5, 7, 100])
def test_sequences_read_the_stream_across_shards(tmp_path, shard_tokens):
    manifest = write(tmp_path, [3, 11, 1, 6], shard_tokens)
    assert len(manifest.train.shards) == -(-21 // shard_tokens)
    sequences = TokenSequences(manifest, "train", seq_len=4)
    assert len(sequences) == 5
    input_ids_BL, labels_BL = sequences.batch([4, 0, 2]).values()
    assert input_ids_BL.dtype == labels_BL.dtype == np.int64
    assert input_ids_BL.tolist() == [[16, 17, 18, 19], [0, 1, 2, 3], [8, 9, 10, 11]]
    assert labels_BL.tolist() == (input_ids_BL + 1).tolist()


@pytest.mark.parametrize("seq_len", [1, 4, 5, 10, 20, 50])
def test_every_held_out_token_but_the_first_is_predicted_once(tmp_path, seq_len):
    sequences = TokenSequences(write(tmp_path, [3, 11, 1, 6], 7), "train", seq_len, cover_all=True)
    input_ids_BL, labels_BL = sequences.batch(range(len(sequences))).values()
    has_label = labels_BL != NO_LABEL
    assert labels_BL[has_label].tolist() == list(range(1, 21))
    assert input_ids_BL[has_label].tolist() == list(range(20))
    assert set(input_ids_BL[~has_label]) <= {EOS}


@pytest.mark.parametrize("shard_tokens", [1, 4, 7, 100])
def test_positions_restart_with_each_document(tmp_path, shard_tokens):
    manifest = write(tmp_path, [3, 11, 1, 6], shard_tokens)
    sequences = TokenSequences(manifest, "train", seq_len=6, keep_apart=True, cover_all=True)
    assert sequences.batch([0, 1, 2, 3])["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, 2],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 0, 0, 1, 2],
        [0, 1, 2, 3, 4, 5],
    ]


def test_a_prepared_corpus_reads_back_as_its_tokens(texts, corpus_of, tmp_path):
    manifest = prepare(corpus_of(), tmp_path / "cache")
    stream = np.fromfile(manifest.folder / manifest.held_out.shards[0], dtype=manifest.dtype)
    sequences = TokenSequences(manifest, "held_out", seq_len=32, cover_all=True)
    labels_BL = sequences.batch(range(len(sequences)))["labels"]
    assert labels_BL[labels_BL != NO_LABEL].tolist() == stream[1:].tolist()


def test_a_corpus_shorter_than_one_sequence_is_refused(tmp_path):
    manifest = write(tmp_path, [3, 11, 1, 6], 7)
    assert len(TokenSequences(manifest, "train", seq_len=20)) == 1
    with pytest.raises(
        ConfigError, match=r"^train.seq_len=21 needs 22 tokens .* has 21; set it to at most 20"
    ):
        TokenSequences(manifest, "train", seq_len=21)
