"""Writing with a finished model: prompts, files, chats and questions, through its own template."""

import io
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.generate import main
from llmtrain.writing import before_stop, overlap
from tests.finished_models import RAFT_ROWS, Models

Said = pytest.CaptureFixture[str]
GREEDY = ["--temperature", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def written(folder: Path, text: str, num_tokens: int) -> str:
    """What plain transformers continues a text with."""
    ids = written_ids(folder, text, num_tokens)
    return AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)


def written_ids(folder: Path, text: str, num_tokens: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ends = [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    ids_BL = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return ids_BL[0, inputs["input_ids"].shape[1] :].tolist()


def in_template(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_a_model_without_template_continues_the_prompt(
    models: Models, name: str, capsys: Said
) -> None:
    folder = getattr(models, name)
    assert main([str(folder), "--prompt", "What is", "--max-new-tokens", "12", *GREEDY]) == 0
    said = capsys.readouterr()
    assert said.out == "What is" + written(folder, "What is", 12) + "\n"
    assert "tok/s" in said.err


def test_a_prompt_goes_through_the_chat_template_unless_raw(models: Models, capsys: Said) -> None:
    words = [str(models.llama), "--prompt", "What is", "--max-new-tokens", "12", *GREEDY]
    assert main(words) == 0
    assert capsys.readouterr().out == written(models.llama, in_template("What is"), 12) + "\n"
    assert main([*words, "--raw"]) == 0
    assert capsys.readouterr().out == "What is" + written(models.llama, "What is", 12) + "\n"


def test_a_pretraining_run_continues_text_though_its_tokenizer_has_a_template(
    models: Models, capsys: Said
) -> None:
    assert (
        main([str(models.text_run), "--prompt", "What is", "--max-new-tokens", "3", *GREEDY]) == 0
    )
    assert capsys.readouterr().out.startswith("What is")


def test_an_adapter_is_opened_on_its_base_by_itself(models: Models, capsys: Said) -> None:
    words = ["--prompt", "What is", "--max-new-tokens", "12", *GREEDY]
    assert main([str(models.adapter), *words]) == 0
    adapted = capsys.readouterr().out
    assert main([str(models.llama), *words]) == 0
    assert adapted != capsys.readouterr().out


def test_a_base_that_has_moved_is_given(models: Models, tmp_path: Path, capsys: Said) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in models.adapter.iterdir():
        text = file.read_bytes()
        if file.name == "adapter_config.json":
            text = text.replace(str(models.llama).encode(), b"/nowhere/llama")
        (moved / file.name).write_bytes(text)
    words = [str(moved), "--prompt", "What is", "--max-new-tokens", "12", *GREEDY]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--base=/nowhere/llama is the adapter's base and is not there" in said
    assert main([*words, "--base", str(models.llama)]) == 0
    moved_out = capsys.readouterr().out
    assert main([str(models.adapter), *words[1:]]) == 0
    assert moved_out == capsys.readouterr().out


def test_chat_through_a_pipe_remembers_what_was_said(
    models: Models, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "What is 1 plus 2?\nAnd 3?\n/reset\nWhat is 1 plus 2?\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main([str(models.llama), "--chat", "--max-new-tokens", "6", *GREEDY]) == 0
    said = capsys.readouterr()
    first = written(models.llama, in_template("What is 1 plus 2?"), 6)
    history = in_template("What is 1 plus 2?") + first.strip() + "<|im_end|>\n"
    second = written(models.llama, history + in_template("And 3?"), 6)
    assert said.out == f"{first}\n{second}\n{first}\n"
    assert said.err.count("tok/s") == 3


def test_a_chat_forgets_its_oldest_turns_before_it_outgrows_the_model(
    models: Models, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 1 plus 2? And what is 2 plus 3?\n" * 6))
    assert main([str(models.gpt2), "--chat", "--max-new-tokens", "8", *GREEDY]) == 0
    said = capsys.readouterr()
    assert "no chat template; a plain one is used" in said.err
    assert "the oldest 2 turns no longer fit" in said.err


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_a_file_is_answered_in_batches_as_each_prompt_by_itself(
    models: Models, name: str, tmp_path: Path, capsys: Said
) -> None:
    folder = getattr(models, name)
    file, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts = ["What is 1 plus 2?", "It", "What is", "It is 3. What is 4 plus 5? It is"]
    file.write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    words = [str(folder), "--raw", "--max-new-tokens", "8", *GREEDY]
    assert main([*words, "--file", str(file), "--batch-size", "3", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["answer"] for row in rows] == [written(folder, text, 8) for text in prompts]


def test_rows_of_messages_are_answered_where_the_assistant_would(
    models: Models, capsys: Said
) -> None:
    assert main([str(models.llama), "--file", str(models.chat_rows), *GREEDY]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 30
    assert [message["role"] for message in rows[0]["messages"]] == ["user"]


def test_a_row_that_asks_nothing_is_named(models: Models, capsys: Said) -> None:
    file = models.write_rows("bad.jsonl", [{"prompt": "a"}, {"text": "b"}])
    assert main([str(models.llama), "--file", str(file), *GREEDY]) == 2
    assert "bad.jsonl:2: asks nothing" in capsys.readouterr().err


def test_an_answer_ends_before_a_stop_string(models: Models, capsys: Said) -> None:
    words = [str(models.gpt2), "--prompt", "What is", "--max-new-tokens", "20", *GREEDY]
    assert main(words) == 0
    whole = capsys.readouterr().out.removesuffix("\n")
    stop = whole[10:13]
    cut = whole[: whole.index(stop, len("What is"))]
    assert main([*words, "--stop", "never", "--stop", stop]) == 0
    assert capsys.readouterr().out == cut + "\n"


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    assert overlap("It is\nUs", "\nUser:") == 3
    assert overlap("It is", "\nUser:") == 0
    assert before_stop("one END two STOP", ["STOP", "END"]) == "one "


def test_an_answer_ends_at_any_of_the_end_tokens(
    models: Models, tmp_path: Path, capsys: Said
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.gpt2)
    ids = written_ids(models.gpt2, "What is", 12)
    model = AutoModelForCausalLM.from_pretrained(models.gpt2)
    model.generation_config.eos_token_id = [0, ids[5]]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["--prompt", "What is", "--max-new-tokens", "12", *GREEDY]
    assert main([str(tmp_path), *words]) == 0
    assert capsys.readouterr().err.startswith(f"{ids.index(ids[5]) + 1} tokens")


def test_the_same_seed_writes_the_same(models: Models, capsys: Said) -> None:
    words = [str(models.gpt2), "--prompt", "What", "--max-new-tokens", "12", "--temperature", "2"]
    said = []
    for seed in ("1", "1", "2"):
        assert main([*words, "--seed", seed, "--repetition-penalty", "1.2", "--top-k", "40"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_a_raft_run_is_asked_in_its_training_prompt(models: Models, capsys: Said) -> None:
    words = [str(models.raft_run), "--max-new-tokens", "4", *GREEDY]
    assert main([*words, "--question", "Where is the cup?"]) == 0
    said = capsys.readouterr().out
    assert "Where is the cup?" in said
    assert "\nsections:\n  missing " in said
    assert main([*words, "--sample"]) == 0
    assert "Cups are made of clay." in capsys.readouterr().out
    unanswered = [{key: row[key] for key in ("question", "documents")} for row in RAFT_ROWS[:2]]
    file = models.write_rows("asked.jsonl", unanswered)
    assert main([*words, "--file", str(file)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "stands on shelf 1." in rows[1]["messages"][-1]["content"]
    assert rows[1]["sections"] == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", ""], "--prompt='' is empty"),
        (["--prompt", "a", "--top-p", "2"], "--top-p=2.0 is not 0 or more and 1 or less"),
        (["--prompt", "a", "--which", "best"], "--which=best chooses among the models of a run"),
        (["--prompt", "a", "--base", "x"], "--base=x has no use"),
        (["--prompt", "a" * 200, "--raw"], "fills the 128 positions of the model; shorten it."),
        (["--question", "a"], "was not trained on RAFT rows"),
        (["--file", "nowhere.txt"], "--file=nowhere.txt is no file"),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    models: Models, words: list[str], said: str, capsys: Said
) -> None:
    assert main([str(models.gpt2), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_is_no_model_is_refused_in_one_line(
    models: Models, tmp_path: Path, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((models.llama / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"no weights")
    for run in (str(tmp_path), f"{tmp_path}/none", "no-such/model", str(broken)):
        assert main([run, "--prompt", "a"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"run={run}") and error.count("\n") == 1
