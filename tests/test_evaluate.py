"""Judging a finished model, alone and beside another, on the text that it never saw."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.data.sequences import TokenStream
from llmtrain.evaluate import main
from llmtrain.finished import open_manifest
from llmtrain.folder import RunFolder, write_json
from tests.finished_models import ANSWERS, QUESTIONS, Models

Said = pytest.CaptureFixture[str]
QUICK = ["--device", "cpu", "--json", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def evaluated(capsys: Said, *words: str) -> dict[str, Any]:
    assert main([*words, *QUICK]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def nats(folder: Path, ids: list[int]) -> float:
    """The loss of all but the first of these tokens, summed, by plain transformers."""
    ids_BL = torch.tensor([ids])
    with torch.no_grad():
        logits_BLV = AutoModelForCausalLM.from_pretrained(folder)(ids_BL).logits
    return float(
        torch.nn.functional.cross_entropy(logits_BLV[0, :-1], ids_BL[0, 1:], reduction="sum")
    )


def test_perplexity_is_that_of_the_held_out_tokens(models: Models, capsys: Said) -> None:
    found = evaluated(capsys, str(models.text_run))
    manifest = open_manifest(RunFolder(models.text_run))
    split = manifest.held_out
    ids = TokenStream(manifest, "held_out").tokens(0, split.num_tokens).tolist()
    windows = [ids[start : start + 65] for start in range(0, len(ids) - 1, 64)]
    total = sum(nats(models.llama, window) for window in windows)
    assert found["suite"] == "perplexity"
    assert found["num_records"] == len(windows)
    metrics = found["metrics"]
    assert metrics["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    bits = total / math.log(2) / split.num_bytes
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_a_report_is_kept_in_the_run_and_never_written_over(models: Models, capsys: Said) -> None:
    for _ in range(2):
        evaluated(capsys, str(models.raft_run), "--suite", "perplexity", "--limit", "2")
    kept = sorted(path.name for path in (models.raft_run / "evaluations").iterdir())
    assert kept == ["perplexity-final-1.json", "perplexity-final-2.json"]


def test_a_baseline_is_compared_sequence_by_sequence(models: Models, capsys: Said) -> None:
    run = str(models.text_run)
    same = evaluated(capsys, run, "--baseline", str(models.llama))
    assert same["comparison"]["loss"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    adapter = str(models.adapter)
    found = evaluated(capsys, run, "--baseline", adapter)
    gap = found["metrics"]["loss"] - found["baseline_metrics"]["loss"]
    compared = found["comparison"]["loss"]
    assert compared["difference"] == pytest.approx(gap)
    assert compared["low"] < gap < compared["high"]
    assert main([run, "--baseline", adapter, "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "95 % interval" in table and "bits_per_byte" in table


def test_models_with_other_tokens_are_compared_by_bits_of_the_same_documents(
    models: Models, capsys: Said
) -> None:
    found = evaluated(capsys, str(models.text_run), "--baseline", str(models.coarse))
    assert set(found["comparison"]) == {"bits_per_byte"}
    pairs = zip(found["records"], found["baseline_records"], strict=True)
    for ours, theirs in pairs:
        assert ours["id"] == theirs["id"] and ours["num_bytes"] == theirs["num_bytes"]
        assert ours["num_tokens"] < theirs["num_tokens"]


def test_a_checkpoint_is_put_together_from_its_fragments(models: Models, capsys: Said) -> None:
    folder = RunFolder(models.text_run)
    weights = load_file(models.adapter.parent / "llama" / "model.safetensors")
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, values in weights.items():
        flat, cut = values.flatten(), values.numel() // 3
        halves[0][f"master|{name}|0"] = flat[:cut].clone()
        halves[1][f"master|{name}|{cut}"] = flat[cut:].clone()
    folder.checkpoint(7).mkdir(parents=True)
    for rank, half in enumerate(halves):
        save_file(half, folder.checkpoint(7) / f"rank_{rank}.safetensors")
    write_json(folder.checkpoint(7) / "state.json", {"step": 7})
    run = str(models.text_run)
    found = evaluated(capsys, run, "--which", "7", "--limit", "5")
    assert found["which"] == "step_7"
    final = evaluated(capsys, run, "--limit", "5")
    assert found["metrics"]["loss"] == pytest.approx(final["metrics"]["loss"], rel=2e-2)  # bf16
    assert main([run, "--which", "8"]) == 2
    assert "--which=8 is no checkpoint (7 kept)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers_are_compared_with_the_references_that_were_held_out(
    models: Models, name: str, capsys: Said
) -> None:
    base = getattr(models, name)
    run = models.chat_run(f"chat_{name}", base, base)
    found = evaluated(capsys, str(run))
    assert found["suite"] == "answers"
    assert 0 < found["num_records"] < len(QUESTIONS)
    assert {"exact_match", "f1", "rouge_l", "reference_loss"} == set(found["metrics"])
    record = found["records"][0]
    assert record["reference"] == ANSWERS[QUESTIONS.index(record["question"])]
    tokenizer = AutoTokenizer.from_pretrained(base)
    if name == "llama":
        prompt = f"<|im_start|>user\n{record['question']}<|im_end|>\n<|im_start|>assistant\n"
        text = f"{prompt}{record['reference']}<|im_end|>"
    else:
        prompt = f"User: {record['question']}\n\nAssistant:"
        text = f"{prompt} {record['reference']}<|endoftext|>"
    before, ids = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text)
    )
    assert record["num_tokens"] == len(ids) - len(before)
    loss = (nats(base, ids) - nats(base, before)) / record["num_tokens"]
    assert record["reference_loss"] == pytest.approx(loss, rel=1e-3)


def test_raft_answers_are_scored_by_their_structure(models: Models, capsys: Said) -> None:
    found = evaluated(capsys, str(models.raft_run), "--baseline", str(models.adapter))
    assert found["suite"] == "raft"
    names = {"section_share", "quote_share", "uses_oracle"}
    assert names < set(found["metrics"]) and names < set(found["comparison"])
    assert found["records"][0]["num_oracles"] in (0, 1)


def test_any_model_is_judged_on_any_file(models: Models, tmp_path: Path, capsys: Said) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is 1 plus 2? It is 3.\n" * 20, encoding="utf-8")
    out = tmp_path / "found.json"
    words = [str(models.mamba), "--data", str(text), "--out", str(out)]
    found = evaluated(capsys, *words)
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert found["records"][0]["num_bytes"] == len(text.read_bytes())
    rows = evaluated(capsys, str(models.gpt2), "--data", str(models.chat_rows))
    assert (rows["suite"], rows["num_records"]) == ("answers", len(QUESTIONS))
    raft = evaluated(capsys, str(models.llama), "--data", str(models.raft_rows), "--limit", "3")
    assert (raft["suite"], raft["num_records"]) == ("raft", 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--data=null is needed"),
        (["--data", "nowhere.jsonl"], "--data=nowhere.jsonl is no file"),
        (["--suite", "perplexty"], "--suite=perplexty is no suite; the nearest is perplexity"),
        (["--limit", "0"], "--limit=0 is below 1"),
        (["--data", "{texts}", "--suite", "raft"], "--suite=raft does not fit data=text"),
        (["--data", "{texts}", "--seq-len", "999"], "--seq-len=999 is more than the 128 positions"),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    models: Models, words: list[str], said: str, capsys: Said
) -> None:
    words = [word.format(texts=models.texts) for word in words]
    assert main([str(models.gpt2), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is here")
def test_lm_eval_is_named_where_it_is_missing(models: Models, capsys: Said) -> None:
    assert main([str(models.gpt2), "--suite", "lm-eval:piqa"]) == 2
    assert "pip install lm-eval" in capsys.readouterr().err
