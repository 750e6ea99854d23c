"""Scores of answers, and whether a difference between two models is more than chance."""

import numpy as np
import pytest

from llmtrain.scores import exact_match, paired_bootstrap, rouge_l, token_f1


def test_case_punctuation_and_articles_do_not_count() -> None:
    assert exact_match("The answer: Paris!", "answer paris") == 1.0
    assert exact_match("Paris, France", "Paris") == 0.0


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    # 2 of 3 words given are wanted, 2 of 4 wanted are given
    assert token_f1("red green blue", "green red black white") == pytest.approx(2 * 2 / 7)
    assert token_f1("red red", "red") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1.0
    assert token_f1("", "red") == 0.0


def test_rouge_l_counts_words_in_their_order() -> None:
    assert rouge_l("police killed gunman", "police kill gunman") == pytest.approx(2 / 3)
    assert rouge_l("gunman kill police", "police kill gunman") == pytest.approx(1 / 3)


def test_chinese_is_compared_character_by_character() -> None:
    assert exact_match("立即就医。", "立即就医") == 1.0
    assert token_f1("立即就医", "及时就医") == pytest.approx(0.5)
    assert rouge_l("aspirin 100 mg 每日", "每日 aspirin 100 mg") == pytest.approx(3 / 5)


def test_a_constant_gain_has_an_interval_of_no_width() -> None:
    found = paired_bootstrap([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert found == (0.5, 0.5, 0.5, 0.0)


def test_noise_is_told_from_a_gain() -> None:
    generator = np.random.default_rng(1)
    before = generator.normal(size=200)
    noisy = paired_bootstrap(before, before + generator.normal(size=200))
    assert noisy.low < 0 < noisy.high and noisy.p > 0.05
    better = paired_bootstrap(before, before + 0.5 + generator.normal(size=200))
    assert 0 < better.low < 0.5 < better.high and better.p < 0.01


def test_the_interval_is_that_of_the_normal_distribution_where_that_holds() -> None:
    gains = np.random.default_rng(2).normal(size=1000)
    found = paired_bootstrap(np.zeros(1000), gains)
    assert found.difference == pytest.approx(gains.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * gains.std() / 1000**0.5, rel=0.05)


def test_weights_make_a_weighted_mean() -> None:
    assert paired_bootstrap([0.0, 0.0], [1.0, 3.0], [3.0, 1.0]).difference == 1.5
