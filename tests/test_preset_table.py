"""The table of presets is what the planner says today."""

from benchmarks.preset_table import MARKS, PAGE, listed, row


def rows() -> dict[str, str]:
    """The line of each preset that it lists."""
    table = PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


def test_the_readme_lists_every_model_preset() -> None:
    assert set(rows()) == set(listed()), "run: python -m benchmarks.preset_table"


def test_a_line_of_the_readme_is_what_the_planner_says() -> None:
    assert rows()["llama_1b"] == row("llama_1b"), "run: python -m benchmarks.preset_table"
