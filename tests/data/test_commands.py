"""`python -m llmtrain.data`: samples of each format, and what training would make of a file."""

import json
from pathlib import Path

import pytest

from llmtrain.data.__main__ import main
from llmtrain.data.sample import WRITERS
from tests.finished_models import Models

FORMATS = [*WRITERS, "raft"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_sample_is_found_to_be_of_its_format(
    name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"sample.{suffix}"
    assert main(["sample", name, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"6 rows of format {name} in {out}\n"
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"format {name}: 6 rows" in said
    assert "6 rows, characters: median" in said
    assert "bad rows" not in said


def test_a_sample_without_a_file_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "alpaca"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [sorted(row) for row in rows] == [["input", "instruction", "output"]] * 6


def test_inspecting_with_a_tokenizer_tells_lengths_cuts_and_what_is_learned(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("What is it?", "It is four."), chat("?", "4 " * 99)]
    path = models.write_rows("mine.jsonl", rows)
    words = ["inspect", str(path), "--tokenizer", str(models.llama), "--seq-len", "64"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "format messages: 2 rows" in said
    assert "1 rows are longer than --seq-len 64 and are cut" in said
    assert "tokens are learned (" in said
    shown = "user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nIt is four.<|im_end|>\n"
    assert f"{path}:1, learned in green\n<|im_start|>{shown}" in said
    assert main([*words, "--template", "plain", "--loss-on", "all"]) == 0
    said = capsys.readouterr().out
    assert "User: What is it?\n\nAssistant: It is four.<|endoftext|>" in said
    assert "(100%)" in said


def chat(question: str, answer: str) -> dict[str, object]:
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_bad_rows_are_counted_and_their_reasons_shown(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models.write_rows("bad.jsonl", [chat("One?", "Yes."), *[{"prompt": "x"}] * 7, {"a": 1}])
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "8 bad rows (data.on_bad_row=skip leaves them out):" in said
    assert f"path={path}:2: has no completion" in said
    assert said.count("bad.jsonl:") == 5
    assert "format unknown: 1 rows" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["inspect", "{folder}/none.jsonl"], "does not exist"),
        (["inspect", "{folder}/empty.jsonl"], "path={folder}/empty.jsonl"),
        (["inspect", "{folder}/wrong.jsonl"], "has no row to learn from; correct its rows"),
        (["inspect", "{folder}/good.jsonl", "--tokenizer", "/nowhere"], "--tokenizer=/nowhere"),
        (
            ["inspect", "{folder}/good.jsonl", "--tokenizer", "{llama}", "--template", "chatlm"],
            "data.template=chatlm is no chat template; the nearest is chatml",
        ),
        (["sample", "alpacca"], "format=alpacca is no format of rows; the nearest is alpaca"),
        (["sample", "text", "--out", "{folder}/good.jsonl"], "exists; give another name"),
        (["sample", "text", "--out", "{folder}/no/such.json"], "cannot be written: No such file"),
        (["sample", "text", "--out", "{folder}/rows.parquet"], "is no .json or .jsonl file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    words: list[str],
    reason: str,
    models: Models,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models.write_rows("empty.jsonl", [])
    models.write_rows("wrong.jsonl", [{"prompt": "x"}])
    models.write_rows("good.jsonl", [chat("One?", "Yes.")])
    names = {"folder": models.root, "llama": models.llama}
    assert main([word.format(**names) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert reason.format(**names) in said
