"""Which source each sequence of a mixture is drawn from: exact shares at every step.

The order is one period of draws, repeated. Within it Tijdeman's rule keeps each source less than
one draw from its share at every point (1980, "The chairman assignment problem").
"""

# K sources, P draws of a period, N draws that are asked for

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from llmtrain.data.corpus import PERIOD

Counts = npt.NDArray[np.int64]


class Mixing:
    """Draws from sources of these weights, at least one in 4,096 each; any can be asked for."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts_K = parts_of(weights, PERIOD)
        self.pattern_P = pattern_of(tuple(map(int, self.counts_K)))
        is_drawn_PK = self.pattern_P[:, None] == np.arange(len(weights))
        first_K = np.zeros((1, len(weights)), dtype=np.int64)
        self.before_PK = np.concatenate([first_K, np.cumsum(is_drawn_PK, axis=0)])

    def draws(self, numbers_N: npt.ArrayLike) -> tuple[Counts, Counts]:
        """The source of each draw, and how many draws of that source came before it."""
        periods_N, within_N = np.divmod(np.asarray(numbers_N, dtype=np.int64), PERIOD)
        sources_N = self.pattern_P[within_N]
        earlier_N = periods_N * self.counts_K[sources_N] + self.before_PK[within_N, sources_N]
        return sources_N, earlier_N

    def counts(self, num_draws: int) -> Counts:
        """How many of the first draws each source has."""
        periods, within = divmod(num_draws, PERIOD)
        counts_K: Counts = periods * self.counts_K + self.before_PK[within]
        return counts_K

    def until_dry(self, sizes: Sequence[int]) -> int:
        """How many draws there are before one of the sources has given all of its sequences."""
        return min(
            self.number_of(source, size) for source, size in enumerate(sizes) if size is not None
        )

    def number_of(self, source: int, draw: int) -> int:
        """Which draw of all is this one of a source, counting from 0."""
        periods, within = divmod(draw, int(self.counts_K[source]))
        (places,) = np.nonzero(self.pattern_P == source)
        return periods * PERIOD + int(places[within])


def parts_of(weights: Sequence[float], total: int) -> Counts:
    """Whole parts of a total in proportion to weights, by the largest remainders; none is 0."""
    shares_K = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    parts_K = np.floor(shares_K).astype(np.int64)
    largest_K = np.argsort(parts_K - shares_K, kind="stable")
    parts_K[largest_K[: total - parts_K.sum()]] += 1
    assert (parts_K > 0).all()
    return parts_K


@lru_cache(maxsize=8)
def pattern_of(counts: tuple[int, ...]) -> Counts:
    """The source of each draw of a period in which each has so many."""
    num_sources, total = len(counts), sum(counts)
    if num_sources == 1:
        return np.zeros(total, dtype=np.int64)
    slack = 1 / (2 * num_sources - 2)
    share_K, drawn_K = np.array(counts) / total, np.zeros(num_sources)
    pattern_P = np.empty(total, dtype=np.int64)
    for number in range(total):
        owed_K = share_K * (number + 1) - drawn_K
        deadline_K = np.where(owed_K >= slack - 1e-9, (1 - slack - owed_K) / share_K, np.inf)
        pattern_P[number] = np.argmin(deadline_K)
        drawn_K[pattern_P[number]] += 1
    return pattern_P
