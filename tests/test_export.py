"""Folders that plain transformers opens, with the logits of what they were made of."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.export import main
from tests.finished_models import Models

Said = pytest.CaptureFixture[str]
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def logits_of(model: Any, folder: Path) -> torch.Tensor:
    inputs = AutoTokenizer.from_pretrained(folder)("What is 1 plus 2?", return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"]).logits


def adapted(adapter: Path, base: Path) -> torch.Tensor:
    """The logits of an adapter on its base, by peft alone."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return logits_of(model, adapter)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_adapter_is_the_adapter_on_its_base(
    models: Models, name: str, tmp_path: Path, capsys: Said
) -> None:
    base = getattr(models, name)
    adapter = models.adapter if name == "llama" else models.gpt2_adapter
    out = tmp_path / "merged"
    assert main([str(adapter), "--to", "merged", "--out", str(out), *CPU]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "its logits differ by" in said.err
    merged = logits_of(AutoModelForCausalLM.from_pretrained(out), out)
    wanted = adapted(adapter, base)
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, logits_of(AutoModelForCausalLM.from_pretrained(base), base))
    figures = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert figures["dtype"] == "fp32" and figures["logits_difference"] < 1e-5
    assert not (out / "adapter_config.json").exists()
    template = AutoTokenizer.from_pretrained(out).chat_template
    assert template == AutoTokenizer.from_pretrained(base).chat_template


def test_a_model_is_written_in_another_dtype(models: Models, tmp_path: Path, capsys: Said) -> None:
    out = tmp_path / "half"
    words = ["--to", "safetensors", "--dtype", "bf16", "--out", str(out), *CPU]
    assert main([str(models.gpt2), *words]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    before = logits_of(AutoModelForCausalLM.from_pretrained(models.gpt2), out)
    assert (logits_of(model, out) - before).abs().mean() < 0.05 * before.abs().mean()
    assert str(out) in (out / "README.md").read_text(encoding="utf-8")


def test_a_merged_qlora_says_what_was_lost(models: Models, capsys: Said) -> None:
    run = models.chat_run("qlora", models.adapter, models.llama, "adapter=qlora")
    assert main([str(run), "--to", "merged", "--dtype", "fp32", *CPU]) == 0
    said = capsys.readouterr()
    out = run / "export" / "merged"
    assert said.out == f"{out}\n"
    assert "trained over weights in 4 bits" in said.err and "Held-out loss" in said.err
    figures = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert figures["logits_difference"] < 1e-5
    assert 0.001 < figures["quantized_logits_difference"] < 1
    assert figures["quantized_held_out_loss"] != figures["held_out_loss"]
    assert "4 bits" in (out / "README.md").read_text(encoding="utf-8")


def test_an_adapter_is_copied_as_it_is(models: Models, tmp_path: Path, capsys: Said) -> None:
    out = tmp_path / "copy"
    assert main([str(models.adapter), "--to", "adapter", "--out", str(out), *CPU]) == 0
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (models.adapter / weights).read_bytes()
    assert torch.equal(adapted(out, models.llama), adapted(models.adapter, models.llama))


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("llama", ["--to", "merged"], "--to=merged needs an adapter"),
        ("llama", ["--to", "adapter"], "say --to safetensors"),
        ("adapter", ["--to", "safetensors"], "say --to merged, or --to adapter"),
        ("adapter", ["--to", "adapter", "--dtype", "bf16"], "--dtype=bf16 changes weights"),
    ],
)
def test_an_export_that_a_model_does_not_have_is_refused(
    models: Models, name: str, words: list[str], said: str, tmp_path: Path, capsys: Said
) -> None:
    out = tmp_path / "out"
    assert main([str(getattr(models, name)), *words, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_holds_something_is_never_written_over(
    models: Models, tmp_path: Path, capsys: Said
) -> None:
    (tmp_path / "kept").write_text("")
    assert main([str(models.llama), "--to", "safetensors", "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([str(models.llama), "--to", "safetensors"]) == 2
    assert "--out=null is needed" in capsys.readouterr().err
