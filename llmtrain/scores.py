"""How near an answer is to its reference, and whether one model's scores are better than another's.

A word is what stands between spaces, lower-cased, without punctuation and English articles, as in
SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250). Of Chinese and Japanese each character is a word.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ARTICLES = {"a", "an", "the"}
IDEOGRAM = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
WORD = re.compile(f"[{IDEOGRAM}]|[^\\s{IDEOGRAM}]+")


def words(text: str) -> list[str]:
    """The words of a text, as scores compare them."""
    kept = "".join(letter for letter in text.lower() if not is_punctuation(letter))
    return [word for word in WORD.findall(kept) if word not in ARTICLES]


def is_punctuation(letter: str) -> bool:
    return letter in string.punctuation or unicodedata.category(letter).startswith("P")


def exact_match(answer: str, reference: str) -> float:
    """1 where both have the same words in the same order, else 0."""
    return float(words(answer) == words(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, whatever their order."""
    given, wanted = words(answer), words(reference)
    return f1((Counter(given) & Counter(wanted)).total(), len(given), len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """The same over the longest common subsequence of words (ROUGE-L, Lin 2004)."""
    given, wanted = words(answer), words(reference)
    return f1(longest_common_subsequence(given, wanted), len(given), len(wanted))


def f1(num_shared: int, num_given: int, num_wanted: int) -> float:
    """``2 p r / (p + r)`` of precision and recall; 1 where nothing is wanted and nothing given."""
    total = num_given + num_wanted
    return 2 * num_shared / total if total else 1.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by the table of prefixes row by row."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            longest = diagonal + 1 if word == other else max(row[index], row[index - 1])
            diagonal, row[index] = row[index], longest
    return row[-1]


class Comparison(NamedTuple):
    """A difference of means, its 95 % interval, and how likely chance alone makes one as large."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[float] | None = None,
    num_samples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """By how much ``after`` is above ``before``, each pair being two models on the same text.

    The pairs are drawn with replacement, again and again (Koehn 2004, "Statistical significance
    tests for machine translation evaluation"). ``weights``, as tokens of a text, make weighted
    means. ``p`` is two-sided: twice the share of the samples on the rarer side of zero.
    """
    difference = np.subtract(after, before, dtype=np.float64)
    weight = np.ones(len(difference)) if weights is None else np.asarray(weights, dtype=np.float64)
    gain, generator = weight * difference, np.random.default_rng(seed)
    samples = np.empty(num_samples)
    for number in range(num_samples):
        chosen = generator.integers(len(gain), size=len(gain))
        samples[number] = gain[chosen].sum() / weight[chosen].sum()
    low, high = np.quantile(samples, [0.025, 0.975])
    rarer = min((samples <= 0).mean(), (samples >= 0).mean())
    mean = gain.sum() / weight.sum()
    return Comparison(float(mean), float(low), float(high), float(min(1.0, 2 * rarer)))
