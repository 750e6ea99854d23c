import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.data.corpus import Tokenizer
from llmtrain.data.formats import format_of_row, to_example
from llmtrain.data.sample import sample_rows
from llmtrain.data.source.chat import Chat
from llmtrain.errors import ConfigError

TURNS = [("user", "What is 2 + 2?"), ("assistant", "4")]
HUMAN, GPT = ({"from": "human", "value": TURNS[0][1]}, {"from": "gpt", "value": "4"})
USER, ASSISTANT = ({"role": role, "content": content} for role, content in TURNS)


def chat(path, **options):
    tokenizer = Tokenizer(vocab_size=None)
    return Chat(
        name="chat", path=str(path), tokenizer=tokenizer, validation_fraction=0.05, **options
    )


def refuse(error):
    raise error


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {"instruction": "What is 2 + 2?", "input": "", "output": "4"}),
        ("sharegpt", {"conversations": [HUMAN, GPT]}),
        ("messages", {"messages": [USER, ASSISTANT], "prompt": "kept beside", "text": "too"}),
        ("messages", {"conversations": [USER, ASSISTANT]}),
        ("prompt", {"prompt": [USER], "completion": [ASSISTANT]}),
        ("query", {"query": "What is 2 + 2?", "response": "4"}),
        ("question", {"question": "What is 2 + 2?", "answer": "4", "text": None}),
    ],
)
def test_one_exchange_is_the_same_example_in_every_format(name, row):
    assert format_of_row(row) == name
    example = to_example(row, "a.jsonl:1")
    assert [tuple(message) for message in example.messages] == TURNS
    expected = to_example({"messages": [USER, ASSISTANT]}, "other.json:9")
    assert (example.id, example.place) == (expected.id, "a.jsonl:1")


def test_an_alpaca_row_has_its_input_after_a_blank_line_and_may_have_system_and_history():
    row = {"instruction": "Add.", "input": "2 2", "output": "4", "system": "Be brief."}
    example = to_example({**row, "history": [["Hello", "Hi"]]}, "a:1")
    assert [tuple(message) for message in example.messages] == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hi"),
        ("user", "Add.\n\n2 2"),
        ("assistant", "4"),
    ]


def test_plain_prompts_and_texts_stay_as_they_are():
    example = to_example({"prompt": " 2+2=", "completion": "4\n"}, "a:1")
    assert (example.prompt, example.completion, example.messages) == (" 2+2=", "4\n", ())
    assert to_example({"text": " 2+2=4"}, "a:1").completion == " 2+2=4"


def test_content_may_be_a_list_of_text_parts():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    row = {"messages": [{"role": "user", "content": parts}, ASSISTANT]}
    assert [tuple(message) for message in to_example(row, "a:1").messages] == TURNS


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"foo": 1, "bar": 2},
            r"has foo, bar; known are .*conversations \[from, value\].*; text\.",
        ),
        ({}, "has no field; known are"),
        ({"instruction": "x"}, "has no output; correct or remove that line."),
        ({"instruction": "x", "output": 4}, "has int and not text as output;"),
        ({"instruction": "x", "output": " "}, r"has an empty answer \(turn 2\)"),
        ({"instruction": "", "output": "x"}, r"has an empty question \(turn 1\)"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "has a history that is no list"),
        ({"prompt": "x", "completion": ""}, "has an empty completion"),
        ({"prompt": "x", "completion": [ASSISTANT]}, "has list and not text as completion"),
        ({"text": "\n"}, "has an empty text"),
        ({"messages": "x"}, "has str and not a list of turns"),
        ({"messages": ["x"]}, "has str and not an object as turn 1"),
        ({"messages": []}, "has no turn of the assistant"),
        ({"messages": [USER]}, "has no turn of the assistant"),
        ({"messages": [USER, ASSISTANT, USER]}, "ends with a turn of the user and not"),
        ({"messages": [USER, USER, ASSISTANT]}, r"has two user turns running \(turns 1 and 2\)"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "has role 'bot' in turn 1; known are"),
        ({"messages": [{"role": "user"}]}, "has nothing and not text as content of turn 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "has a part of type image, and only text is learned",
        ),
        ({"conversations": [HUMAN, {"value": "x"}]}, "has from None in turn 2"),
        ({"text": "\ud800"}, "holds half of a surrogate pair"),
        ({"question": "x", "documents": []}, "is a RAFT row; say data=raft"),
    ],
)
def test_a_row_that_teaches_no_answer_is_refused_with_its_place(row, reason):
    with pytest.raises(ConfigError, match=rf"^data.path=mine.jsonl:7: {reason}"):
        to_example(row, "mine.jsonl:7")


@pytest.mark.parametrize("kind", ["alpaca", "sharegpt", "messages", "prompt", "text", "raft"])
def test_the_sample_rows_of_a_format_are_recognised_as_that_format(kind):
    rows = sample_rows(kind)
    assert 3 <= len(rows) <= 8
    assert {format_of_row(row) for row in rows} == {kind}
    if kind != "raft":
        assert len({to_example(row, "a:1").id for row in rows}) == len(rows)


def test_a_sample_of_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="^format=sharegtp .*; the nearest is sharegpt"):
        sample_rows("sharegtp")


def test_all_file_formats_give_the_same_examples_with_their_places(tmp_path):
    rows = sample_rows("messages")
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "data.json").write_text(json.dumps({"data": rows}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    ids = [to_example(row, "").id for row in rows]
    for name, second in [("a.jsonl", 3), ("lines.json", 3), ("list.json", 2), ("data.json", 2),
                         ("a.parquet", 2)]:  # fmt: skip
        corpus = chat(tmp_path / name)
        corpus.check()
        examples = list(corpus.examples(refuse))
        assert [example.id for example in examples] == ids
        assert examples[1].place == f"{tmp_path / name}:{second}"
        assert corpus.num_bytes() > 100
    assert len(list(chat(tmp_path).examples(refuse))) == 5 * len(rows)
    assert len(list(chat(tmp_path / "*.json").examples(refuse))) == 3 * len(rows)


def test_reading_goes_on_after_bad_rows_and_each_is_reported(tmp_path):
    good = json.dumps({"question": "x", "answer": "y"}).encode()
    lines = [good, b"{", b"[1]", b'{"text": "\xff"}', b'{"question": "x"}', good]
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join(lines))
    errors = []
    corpus = chat(tmp_path / "mine.jsonl")
    places = [example.place.rpartition(":")[2] for example in corpus.examples(errors.append)]
    assert places == ["1", "6"]
    reasons = [
        "2: is not JSON (column",
        "3: is not a JSON object",
        "4: is not UTF-8",
        "5: has no a",
    ]
    for error, reason in zip(errors, reasons, strict=True):
        assert str(error).startswith(f"data.path={tmp_path / 'mine.jsonl'}:{reason}")


def test_the_rows_of_a_validation_path_are_read_under_its_key(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "x", "answer": "y"}))
    (tmp_path / "b.jsonl").write_text("{}")
    corpus = chat(tmp_path / "a.jsonl")
    assert list(corpus.validation_examples(refuse)) == []
    before, corpus.validation_path = corpus.fingerprint(), str(tmp_path / "b.jsonl")
    assert corpus.fingerprint() != before
    with pytest.raises(ConfigError, match=r"^data.validation_path=.*b.jsonl:1: has no field"):
        list(corpus.validation_examples(refuse))


def test_paths_that_cannot_be_read_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").touch()
    (tmp_path / "damaged.parquet").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    reasons = {
        "missing.json": "does not exist",
        "folder/missing": "does not exist",
        "folder": "holds no .json, .jsonl, .parquet file",
        "empty.json": "is empty",
        "damaged.parquet": "is not a parquet file",
    }
    for path, reason in reasons.items():
        with pytest.raises(ConfigError, match=rf"^data.path={path} {reason}"):
            chat(path).check()
        good = chat(path)
    good.path = None
    with pytest.raises(ConfigError, match="^data.path=null is not set"):
        good.check()


def test_a_broken_json_file_is_named_by_line_and_column(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"text": "x"},\n{"text" 1}]')
    with pytest.raises(
        ConfigError, match=r"a.json is not JSON \(line 3, column 9: .*correct it\.$"
    ):
        list(chat(tmp_path / "a.json").examples(refuse))


def test_a_hub_name_needs_the_package_that_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"needs the package datasets; .*pip install -e '.\[hub\]'"
    ):
        chat("someone/something").check()


def test_a_hub_name_that_cannot_be_had_is_refused_in_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^data.path=someone/something is no path here, and the"):
        list(chat("someone/something").examples(refuse))
