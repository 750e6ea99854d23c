"""A model with an instruction template goes through every path, by the commands a user types."""

import json
from pathlib import Path

import pytest
import torch

from llmtrain import evaluate, export, generate
from tests.conftest import Command
from tests.finished_models import ANSWERS, QUESTIONS, RAFT_ROWS, TEMPLATE, Models

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
QUICK = ["train.seq_len=512", "train.global_batch=8", "train.max_steps=12", "optimizer.lr=5e-3"]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2 with random weights and a ChatML template."""
    models = Models(tmp_path_factory.mktemp("models"))
    path = models.save("qwen2", hidden_size=64, intermediate_size=128, **SIZES)
    models.tokenizer(TEMPLATE).save_pretrained(path)
    return path


def train(command: Command, name: str, *words: str) -> Path:
    """A run of the command to its end; its folder."""
    done = command.run(f"name={name}", *QUICK, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (command.folder / "outputs").glob(f"{name}-*")
    return run


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record]


def test_fine_tuning_and_distilling_end_in_a_model_that_answers_anywhere(
    command: Command, instruct: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    chats, questions = command.folder / "chats.jsonl", command.folder / "raft.json"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions.write_text(json.dumps(RAFT_ROWS))

    start = ["model=pretrained", f"model.path={instruct}", "data.validation_fraction=0.2"]
    teach = ["mode=sft", "data=chat", f"data.path={chats}", "adapter=lora"]
    tuned = train(command, "tuned", *teach, *start)
    assert losses(tuned)[-1] < losses(tuned)[0]
    assert export.main([str(tuned), "--to", "merged"]) == 0
    merged = tuned / "export" / "merged"

    taught_by = ["mode=distill", "data=raft", f"data.path={questions}", "prompt@data.prompt=stdlib"]
    start[1] = f"model.path={merged}"
    raft = train(command, "raft", *taught_by, *start)
    assert losses(raft)[-1] < losses(raft)[0]
    capsys.readouterr()

    greedy = ["--max-new-tokens", "8", "--temperature", "0"]
    assert generate.main([str(tuned), "--prompt", QUESTIONS[0], *greedy]) == 0
    assert generate.main([str(raft), "--question", RAFT_ROWS[0]["question"], *greedy]) == 0
    assert generate.main([str(raft), "--sample", *greedy]) == 0
    assert "sections" in capsys.readouterr().out.lower()
    limits = ["--limit", "3", "--max-new-tokens", "8", "--json"]
    assert evaluate.main([str(raft), "--baseline", str(merged), *limits]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["suite"] == "raft"
    assert found["metrics"]["reference_loss"] < found["baseline_metrics"]["reference_loss"]
    opens_in_plain_transformers(raft / "final")


def opens_in_plain_transformers(path: Path) -> None:
    """The folder brings its model, its tokenizer and its template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    turn = [{"role": "user", "content": "hello"}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path)(asked["input_ids"]).logits
    assert torch.isfinite(logits).all()
    assert "<|im_start|>assistant" in tokenizer.decode(asked["input_ids"][0])
