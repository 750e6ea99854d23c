"""When losses show that training went wrong: soon where it did, never where it did not."""

import json
import math
from collections.abc import Iterable

import numpy as np
import pytest

from llmtrain.stability import Diverging, OnDivergence, Rollback, Stability, TakenStep

DEFAULTS = OnDivergence()


def watched(losses: Iterable[float], settings: OnDivergence = DEFAULTS) -> Stability:
    """The account of a run's losses; a step whose loss is NaN was skipped."""
    stability = Stability()
    for step, loss in enumerate(losses, 1):
        was_skipped = not math.isfinite(loss)
        stability.note(TakenStep(step, loss, 1.0, 1e-3, was_skipped), is_overflow=False)
        stability.check(settings)
    return stability


def falling(num_steps: int, noise: float, seed: int = 0) -> list[float]:
    """A loss curve as they are: from ln V down a power of the step, with noise."""
    steps = np.arange(1, num_steps + 1)
    curve = 2.0 + 8.0 * steps**-0.3
    return list(curve + np.random.default_rng(seed).normal(0, noise, num_steps))


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.5])
def test_an_ordinary_curve_is_never_called_a_spike(noise: float) -> None:
    watched(falling(3000, noise))


def test_batches_of_two_kinds_are_never_called_a_spike() -> None:
    random = np.random.default_rng(0)
    for share in (0.05, 0.2, 0.4):
        hard = random.random(3000) < share
        watched(np.where(hard, 3.0, 0.01) + random.normal(0, 1e-3, 3000))


def test_a_single_loss_far_above_the_others_is_let_pass() -> None:
    losses = falling(200, 0.02)
    losses[150] = 50.0
    watched(losses)


def test_a_loss_that_rises_and_stays_is_found_after_eight_steps() -> None:
    losses = falling(200, 0.02)
    losses[150:] = [loss + 3 for loss in losses[150:]]
    with pytest.raises(Diverging, match="Step 158: the loss rose to") as found:
        watched(losses)
    assert found.value.first_step == 151
    watched(losses, OnDivergence(spike_threshold=None))


def test_steps_that_are_skipped_in_a_row_are_too_many_at_last() -> None:
    losses = [3.0, 2.9, *[math.nan] * 9, 2.8, *[math.nan] * 10]
    watched(losses[:-1])
    with pytest.raises(Diverging, match="Step 22: the loss is not finite, the 10th step") as found:
        watched(losses)
    assert found.value.first_step == 13


def test_overflows_of_a_loss_scale_that_still_falls_are_counted_and_no_failure() -> None:
    stability = Stability()
    for step in range(1, 20):
        stability.note(TakenStep(step, 3.0, math.inf, 1e-3, was_skipped=True), is_overflow=True)
        stability.check(DEFAULTS)
    assert stability.num_skipped == 19
    assert not stability.is_suspicious(DEFAULTS)


def test_what_a_checkpoint_keeps_is_judged_alike() -> None:
    losses = falling(150, 0.02)
    losses[60], losses[149] = math.nan, 9.0
    stability = watched(losses)
    stability.go_back(watched(losses[:100]), Rollback(1, "why", 150, 100, 50))
    again = Stability.restored(json.loads(json.dumps(stability.saved(), allow_nan=False)))
    assert again.saved() == stability.saved()
    assert again.limit(DEFAULTS) == stability.limit(DEFAULTS)
    assert (again.data_offset, again.steps[-1].step, len(again.rollbacks)) == (50, 100, 1)
    assert Stability.restored({}).saved() == Stability().saved()
