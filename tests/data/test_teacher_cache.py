"""Cached targets come back as they were written, in few bytes, and only to the run they are for."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.data.teacher_cache import TeacherCache, TeacherHeader, targets_of
from llmtrain.errors import ConfigError
from llmtrain.kernel.divergence import TargetKind

HEADER = TeacherHeader(
    teacher="a1",
    vocabulary="b2",
    vocab_size=500,
    manifest="c3",
    seq_len=6,
    kind=TargetKind.top_k,
    k=12,
    temperature=2.0,
    precision="fp32",
    seed=0,
)


def some_targets(header: TeacherHeader, num_sequences: int = 5) -> list[tuple[Any, Any]]:
    torch.manual_seed(0)
    options = (header.k, header.kind, header.temperature)
    logits_NLV = 6 * torch.randn(num_sequences, header.seq_len, 500)
    pairs = [targets_of(logits_LV, *options) for logits_LV in logits_NLV]
    return [(ids.numpy(), probs.numpy()) for ids, probs in pairs]


@pytest.mark.parametrize("kind", TargetKind)
def test_targets_are_read_as_they_were_written(tmp_path: Path, kind: TargetKind) -> None:
    header = replace(HEADER, kind=kind)
    targets = some_targets(header)
    TeacherCache.write(tmp_path / "targets", header, 5, targets)
    ids_BLK, probs_BLK = TeacherCache.open(tmp_path / "targets", header).read([3, 0])
    assert (ids_BLK.dtype, probs_BLK.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(ids_BLK, [targets[3][0], targets[0][0]])
    np.testing.assert_allclose(probs_BLK, [targets[3][1], targets[0][1]], rtol=6e-3, atol=2e-4)


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(65536, 48), (65537, 72)])
def test_twelve_targets_take_below_a_hundred_bytes_a_token(
    tmp_path: Path, vocab_size: int, bytes_per_token: int
) -> None:
    header = replace(HEADER, vocab_size=vocab_size)
    cache = TeacherCache.write(tmp_path / "targets", header, 5, some_targets(header))
    tokens = cache.num_sequences * header.seq_len
    assert (cache.ids_NLK.nbytes + cache.log_probs_NLK.nbytes) / tokens == bytes_per_token


def test_a_cache_of_another_teacher_is_refused_with_what_differs(tmp_path: Path) -> None:
    TeacherCache.write(tmp_path, HEADER, 5, some_targets(HEADER))
    expected = replace(HEADER, teacher="d4", temperature=1.0)
    differing = re.escape("teacher=a1 in place of d4, temperature=2.0 in place of 1.0;")
    with pytest.raises(ConfigError, match=differing):
        TeacherCache.open(tmp_path, expected)


def test_a_folder_without_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no teacher's targets"):
        TeacherCache.open(tmp_path, HEADER)


def test_a_cache_that_was_not_filled_to_its_end_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "targets"
    with pytest.raises(ValueError):
        TeacherCache.write(folder, HEADER, 5, some_targets(HEADER, num_sequences=4))
    assert not folder.exists()


def test_a_whole_cache_is_not_computed_again(tmp_path: Path) -> None:
    TeacherCache.write(tmp_path / "targets", HEADER, 5, some_targets(HEADER))
    assert TeacherCache.write(tmp_path / "targets", HEADER, 5, []).num_sequences == 5


def test_draws_are_those_of_the_teacher_and_the_same_for_the_same_seed() -> None:
    probs_TV = torch.tensor([[0.7, 0.2, 0.1]]).expand(4000, 3)
    drawn = [
        targets_of(2 * probs_TV.log(), 12, TargetKind.sampled, 2.0, generator.manual_seed(1))
        for generator in (torch.Generator(), torch.Generator())
    ]
    assert torch.equal(drawn[0][0], drawn[1][0])
    share_V = torch.bincount(drawn[0][0].flatten()) / drawn[0][0].numel()
    torch.testing.assert_close(share_V, probs_TV[0], rtol=0, atol=0.01)
