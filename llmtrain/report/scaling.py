"""Held-out loss against training compute, and the power law through the best run of each size."""

import math
from dataclasses import dataclass

import numpy as np

from llmtrain.report.comparison import Comparison
from llmtrain.report.record import Run

LEAST_SIZES, LEAST_FITTED = 3, 4  # three points determine three constants, and say nothing of them
ALPHAS = np.geomspace(0.01, 2.0, 600)


@dataclass(frozen=True)
class PowerLaw:
    """``L = E + A * (C / scale) ** -alpha``: loss over C training FLOPs, E what no compute removes.

    The form is that of Hoffmann et al. 2022 (arXiv:2203.15556), with compute in place of its terms
    of parameters and data. ``low`` and ``high`` are the alphas that fit about as well.
    """

    floor: float
    factor: float
    alpha: float
    scale: float
    low: float
    high: float

    def loss(self, flops: float) -> float:
        return self.floor + self.factor * (flops / self.scale) ** -self.alpha

    @property
    def amplitude(self) -> float:
        """A with C in FLOPs."""
        return self.factor * self.scale**self.alpha


def sized_runs(comparison: Comparison) -> list[Run]:
    """The finished runs with a size, compute and a held-out loss; none for fewer than 3 sizes."""
    runs = [run for run in comparison.finished if run.parameters and run.flops and run.eval_loss]
    return runs if len({run.parameters for run in runs}) >= LEAST_SIZES else []


def frontier(runs: list[Run]) -> list[Run]:
    """The best run of each size, the smallest first: the others show what settings cost."""
    best: dict[float, Run] = {}
    for run in sorted(runs, key=lambda run: run.eval_loss or math.inf):
        best.setdefault(run.parameters or 0.0, run)
    return [best[size] for size in sorted(best)]


def fit(flops: list[float], losses: list[float]) -> PowerLaw | None:
    """The power law with the least squares; None where the points do not determine one.

    For a given alpha the law is linear in E and A, so that alpha alone is searched for.
    """
    if len(set(flops)) < LEAST_FITTED:
        return None
    scale = math.exp(sum(map(math.log, flops)) / len(flops))
    x, y = np.array(flops) / scale, np.array(losses)
    fits = [linear(x**-alpha, y) for alpha in ALPHAS]
    squares = np.array([squared for _, _, squared in fits])
    best = int(squares.argmin())
    floor, factor, _ = fits[best]
    allowed = np.flatnonzero(squares <= likely(squares[best], len(flops)))
    is_open = allowed[0] == 0 or allowed[-1] == len(ALPHAS) - 1
    if is_open or floor < 0 or factor <= 0:
        return None
    low, high = ALPHAS[allowed[0]], ALPHAS[allowed[-1]]
    return PowerLaw(floor, factor, float(ALPHAS[best]), scale, float(low), float(high))


def linear(basis: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """E, A and the sum of squares left, of y = E + A * basis."""
    matrix = np.stack([np.ones_like(basis), basis], axis=1)
    (floor, factor), *_ = np.linalg.lstsq(matrix, y, rcond=None)
    residual = y - matrix @ np.array([floor, factor])
    return float(floor), float(factor), float(residual @ residual)


def likely(least: float, num_points: int) -> float:
    """Sums of squares up to this are no worse than by chance: one standard deviation of alpha."""
    return least * (1 + 1 / (num_points - 3)) + 1e-12
