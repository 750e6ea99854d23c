"""What a run proposes at its end."""

from pathlib import Path

import pytest

from llmtrain.display import longer_words
from llmtrain.folder import RunFolder, write_text
from tests.test_compose import compose_config


@pytest.mark.parametrize(
    ("given", "proposed"),
    [
        ("experiment=mine seed=1", ["experiment=mine", "seed=1", "train.max_epochs=null"]),
        ("seed=1 train.max_epochs=3", ["seed=1"]),
    ],
)
def test_a_longer_run_takes_back_the_horizon_of_its_experiment(
    given: str, proposed: list[str], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    write_text(folder.config, compose_config("train.max_epochs=3").to_yaml())
    write_text(folder.overrides, f"{given}\n")
    assert longer_words(folder, 2000) == [*proposed, "train.max_tokens=2e+03"]
