"""Mixtures: exact shares at every step, epochs of each source, and one tokenizer for all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data.corpus import PERIOD, Tokenizer
from llmtrain.data.mixing import Mixing
from llmtrain.data.sequences import MixedSequences
from llmtrain.data.shards import prepare
from llmtrain.data.source.mixture import Mixture, WhenDry
from llmtrain.data.source.text import Text
from llmtrain.errors import ConfigError
from tests.conftest import SMALL, Command

Mixtures = Callable[..., Mixture]


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [0.7, 0.2, 0.1], [1000, 1, 1, 5]])
def test_each_source_is_within_one_sequence_of_its_share_at_every_point(
    weights: list[float],
) -> None:
    mixing = Mixing(weights)
    shares = mixing.counts_K / PERIOD
    sources, _ = mixing.draws(np.arange(2 * PERIOD + 100))
    drawn = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    numbers = np.arange(1, len(sources) + 1)[:, None]
    assert np.abs(drawn - numbers * shares).max() < 1
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < 1 / PERIOD
    for number in (0, 1, 17, PERIOD, 2 * PERIOD + 5):
        expected = np.bincount(sources[:number], minlength=len(weights))
        assert mixing.counts(number).tolist() == expected.tolist()


def test_any_draw_can_be_asked_for_by_itself() -> None:
    mixing = Mixing([5, 2, 1])
    numbers = np.arange(PERIOD + 300)
    sources, earlier = mixing.draws(numbers)
    for number in (0, 3, 999, PERIOD + 299):
        source, before = (int(values) for values in mixing.draws(number))
        assert source == sources[number]
        assert before == earlier[number] == np.sum(sources[:number] == source)


@pytest.fixture
def mixture(tmp_path: Path) -> Mixtures:
    """Two folders of text, of which one has five times as much as the other."""
    for name, count in (("big", 100), ("small", 20)):
        (tmp_path / name).mkdir()
        for number in range(count):
            words = " ".join(f"{name}{number * k % 17}" for k in range(60))
            (tmp_path / name / f"{number}.txt").write_text(f"{number} {words}")

    def make(**options: object) -> Mixture:
        shared = {"held_out_every": 5, "tokenizer": Tokenizer(vocab_size=300)}
        sources = {
            name: Text(name="text", path=str(tmp_path / name), held_out_every=20)
            for name in ("big", "small")
        }
        return Mixture(name="mixture", **shared | {"sources": sources} | options)

    return make


def sources_read(sequences: MixedSequences, steps: range) -> list[int]:
    """The source of each sequence of some steps."""
    read = np.concatenate([sequences.order(0, step, 8) for step in steps])
    return (np.searchsorted(sequences.first_index, read, side="right") - 1).tolist()


def test_a_run_reads_its_sources_in_their_shares(mixture: Mixtures, tmp_path: Path) -> None:
    manifest = prepare(mixture(weights={"big": 1, "small": 3}), tmp_path / "cache")
    sequences = MixedSequences(manifest, 32)
    for steps in (1, 7, 200):
        read = sources_read(sequences, range(steps))
        assert abs(read.count(1) - 0.75 * len(read)) < 1
    texts = [source.num_tokens for source in manifest.sources]
    assert sum(texts) == manifest.train.num_tokens
    assert texts[0] > 4 * texts[1]


def test_without_weights_sizes_count_and_temperature_raises_the_small(
    mixture: Mixtures, tmp_path: Path
) -> None:
    plain = prepare(mixture(), tmp_path / "cache")
    sizes = {source.name: source.num_tokens for source in plain.sources}
    small = sizes["small"] / sum(sizes.values())
    assert plain.sources[1].share == pytest.approx(small)
    warm = prepare(mixture(temperature=2), tmp_path / "cache")
    roots = {name: size**0.5 for name, size in sizes.items()}
    assert warm.sources[1].share == pytest.approx(roots["small"] / sum(roots.values()))
    assert {shard.path for shard in warm.train.shards} == {
        shard.path for shard in plain.train.shards
    }


def test_every_sequence_of_a_source_is_read_once_in_each_of_its_epochs(
    mixture: Mixtures, tmp_path: Path
) -> None:
    manifest = prepare(mixture(weights={"big": 1, "small": 1}), tmp_path / "cache")
    sequences = MixedSequences(manifest, 32)
    size, first = sequences.sizes[1], sequences.first_index[1]
    read = np.concatenate([sequences.order(3, step, 8) for step in range(2 * size)])
    of_small = (read[read >= first] - first)[: 3 * size].reshape(3, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in of_small.tolist())
    assert of_small[0].tolist() != of_small[1].tolist()


def test_no_sequence_spans_two_sources(mixture: Mixtures, tmp_path: Path) -> None:
    manifest = prepare(mixture(), tmp_path / "cache")
    sequences = MixedSequences(manifest, 32)
    starts = np.array(sequences.first_tokens(np.arange(len(sequences))))
    border = manifest.sources[0].num_tokens
    assert not ((starts < border) & (starts + 32 >= border)).any()
    assert (starts[: sequences.sizes[0]] < border).all()


def test_a_source_that_is_dry_ends_the_run_where_that_is_asked(
    mixture: Mixtures, tmp_path: Path
) -> None:
    ending = mixture(weights={"big": 1, "small": 1}, when_dry=WhenDry.stop)
    sequences = MixedSequences(prepare(ending, tmp_path / "cache"), 32)
    assert sequences.num_draws is not None
    counts = sequences.mixing.counts(sequences.num_draws)
    assert counts[1] == sequences.sizes[1]
    repeating = prepare(mixture(weights={"big": 1, "small": 1}), tmp_path / "cache")
    assert MixedSequences(repeating, 32).num_draws is None


def test_what_cannot_be_mixed_is_refused_by_the_key_that_is_wrong(mixture: Mixtures) -> None:
    wrong = {
        "^data.weights=smaller is the weight of no source; the nearest is small": {"smaller": 1},
        "^data.weights.small=null is not set": {"big": 1},
        "^data.weights.small=0 is no number above 0": {"big": 1, "small": 0},
    }
    for message, weights in wrong.items():
        with pytest.raises(ConfigError, match=message):
            mixture(weights=weights).check()
    with pytest.raises(ConfigError, match="^data.sources={} holds no source; give some"):
        mixture(sources={}).check()
    lost = mixture()
    lost.sources["small"].path = "nowhere"
    with pytest.raises(ConfigError, match="^data.sources.small.path=nowhere does not exist"):
        lost.check()


def test_a_mixture_from_the_command_line_trains_and_continues(command: Command) -> None:
    words = [
        *SMALL,
        "data=mixture",
        "+data@data.sources.a=text",
        f"data.sources.a.path={command.corpus}",
        "+data@data.sources.b=stdlib",
        "data.weights={a: 1, b: 3}",
        "optimizer=adamw",
        "hardware=cpux1",
    ]
    ended = command.run(*words, "train.max_steps=4")
    assert ended.returncode == 0, ended.stderr
    again = command.run(*words, "train.max_steps=4")
    assert "done" in again.stdout, again.stderr
