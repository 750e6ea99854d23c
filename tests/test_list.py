"""The list of what a command line can choose."""

import json

import pytest

from llmtrain.compose import choices
from llmtrain.compose.composing import groups
from llmtrain.list import described, main


@pytest.mark.parametrize("group", groups())
def test_every_choice_has_a_line_about_it(group: str) -> None:
    found = dict(described(group))
    assert list(found) == choices(group)
    for name, what in found.items():
        assert what, f"{group}={name} has no first comment line"
        assert len(what) <= 110


def test_a_group_is_listed_by_its_name_or_its_plural(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimizers"]) == 0
    plural = capsys.readouterr().out
    assert main(["optimizer"]) == 0
    assert capsys.readouterr().out == plural
    assert "adamw8bit  AdamW with 8-bit moments" in plural


def test_an_experiment_is_described_and_not_only_commanded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["experiments"]) == 0
    said = capsys.readouterr().out
    assert "llama_7b_a800x8      LLaMA-7B on 135B tokens" in said
    assert "python -m" not in said


def test_json_has_the_word_for_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["group"] for item in found} == set(groups())
    tiny = next(item for item in found if item["word"] == "model=llama_tiny")
    assert "small enough to train in minutes on a CPU" in tiny["description"]


def test_an_unknown_group_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimiser"]) == 2
    assert capsys.readouterr().err == "group=optimiser does not exist; the nearest is optimizer.\n"
