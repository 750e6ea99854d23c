"""Each schedule warms up to the full rate and ends where it says."""

import pytest

from tests.test_compose import compose_config

NUM_STEPS, WARMUP_STEPS = 100, 10


def factors(*overrides: str) -> list[float]:
    schedule = compose_config(*overrides).schedule
    return [schedule.factor(step, NUM_STEPS, WARMUP_STEPS) for step in range(NUM_STEPS)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_the_warm_up_is_a_straight_line_to_the_full_rate(kind: str) -> None:
    found = factors(f"schedule={kind}")
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert all(0 <= factor <= 1 for factor in found)


def test_each_ends_where_it_says() -> None:
    assert factors("schedule=cosine")[-1] == pytest.approx(0.1, abs=1e-3)
    assert factors("schedule=linear")[-1] == pytest.approx(0.0, abs=0.02)
    assert factors("schedule=wsd")[80] == 1.0
    assert factors("schedule=wsd")[-1] == pytest.approx(0.0, abs=0.06)
    assert factors("schedule=constant")[-1] == 1.0


def test_no_warm_up_starts_at_the_full_rate() -> None:
    schedule = compose_config("schedule=linear").schedule
    assert schedule.factor(0, NUM_STEPS, 0) == 1.0
