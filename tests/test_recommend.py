"""`python -m llmtrain.data recommend`: tokens, a mixture, disk and days for a model's size."""

import re
from pathlib import Path

import pytest

from llmtrain.data.__main__ import main, parser
from llmtrain.data.catalogue import find_entry
from llmtrain.plan import make_plan
from llmtrain.plan.propose import duration
from llmtrain.recommend import mixture, weights_of
from tests.test_compose import compose_config


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(cache))


def said_of(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert main(["recommend", *words]) == 0
    return capfd.readouterr().out


def test_the_arithmetic_and_the_days_are_those_of_the_plan(
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = said_of(["1b", "--hardware", "a800x4"], capfd)
    assert "compute-optimal: 953M parameters x 20 = 19.1B tokens; " in said
    assert "over-trained: 953M parameters x 200 = 191B tokens; " in said
    plan = make_plan(compose_config("model=llama_1b", "hardware=a800x4", "data=c4"))
    assert plan.step_seconds is not None
    hours = 20 * plan.num_parameters / plan.tokens_per_step * plan.step_seconds / 3600
    assert f"takes {duration(hours)} on 4 x A800" in said
    assert f"takes {duration(10 * hours)} on 4 x A800" in said


def test_the_commands_at_its_end_can_be_typed(capfd: pytest.CaptureFixture[str]) -> None:
    said = said_of(["1b"], capfd)
    downloads = re.findall(r"python -m llmtrain\.data (download .*)", said)
    assert len(downloads) == len(weights_of("en"))
    for line in downloads:
        assert find_entry(parser().parse_args(line.split()).name)
    (planned,) = re.findall(r"python -m llmtrain\.plan (.*)", said)
    plan = make_plan(compose_config(*planned.split()))
    assert plan.num_tokens == pytest.approx(20 * plan.num_parameters, rel=0.02)
    assert plan.data.name == "mixture"


def test_a_preset_may_be_named_and_a_size_without_one_is_reckoned_from_the_nearest(
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = said_of(["llama_350m"], capfd)
    assert "compute-optimal: 350M parameters x 20 = 7.01B tokens" in said
    assert "There is no preset" not in said
    said = said_of(["500m"], capfd)
    assert "There is no preset of 500m: times are those of model=llama_350m, times 1.43" in said
    assert "compute-optimal: 500M parameters x 20 = 10B tokens" in said


def test_a_mixture_of_chinese_is_mostly_chinese() -> None:
    shares = mixture(weights_of("zh"), 20e9)
    chinese = [share for share in shares if share.entry.published.language == "zh"]
    assert sum(share.weight for share in chinese) > 0.6
    assert sum(share.weight for share in shares) == pytest.approx(1)


@pytest.mark.parametrize("num_tokens", [1e9, 20e9, 140e9, 1.4e12, 14e12])
def test_nothing_is_read_more_than_four_times_while_others_have_more(num_tokens: float) -> None:
    shares = mixture(weights_of("en"), num_tokens)
    assert sum(share.num_tokens for share in shares) == pytest.approx(num_tokens)
    assert max(share.num_epochs for share in shares) <= 4.001
    small = next(share for share in shares if share.entry.name == "wikipedia_en")
    assert small.weight == pytest.approx(min(0.05, 4 * 4.6e9 / num_tokens))


def test_the_smallest_sample_that_is_enough_is_taken() -> None:
    names = [mixture(weights_of("en"), tokens)[0].entry.name for tokens in (7e9, 140e9, 1.4e12)]
    assert names == ["fineweb_edu_10bt", "fineweb_edu_100bt", "fineweb_edu"]


def test_too_little_text_for_a_model_is_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    (share,) = mixture({"wikitext": 1.0}, 119e7)
    assert share.num_epochs == pytest.approx(10)
    assert "warning: data=" in said_of(["500b"], capfd)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["huge"], "recommend=huge is no size of a model; give one such as 350m or 7b"),
        (["7b", "--hardware", "a80x8"], "hardware=a80x8 is no choice of hardware; the nearest"),
        (["7b", "--language", "de"], "--language=de has no mixture; choose one of en, zh."),
    ],
)
def test_what_cannot_be_recommended_is_said_in_one_line(
    words: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["recommend", *words]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert reason in said
