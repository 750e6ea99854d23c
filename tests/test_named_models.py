"""Models that others published: their numbers are here, their weights on the hub or in a copy."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.plan import make_plan
from tests.finished_models import Models
from tests.test_compose import compose_config

PUBLISHED = {
    "falcon_mamba_7b": 7_272_665_088,
    "gpt2": 124_439_808,
    "llama2_7b": 6_738_415_616,
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
}

# As the hub has them, by older names: the last names two inner widths, of which 8192 counts.
ROPE_OF_LLAMA3 = {"high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
HUB_FILES: dict[str, dict[str, Any]] = {
    "llama3_1b": {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            **ROPE_OF_LLAMA3,
            "factor": 32.0,
            "original_max_position_embeddings": 8192,
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "qwen3_8b": {
        "model_type": "qwen3",
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    },
    "falcon_mamba_7b": {
        "model_type": "falcon_mamba",
        "conv_kernel": 4,
        "expand": 16,
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 64,
        "state_size": 16,
        "tie_word_embeddings": False,
        "time_step_rank": 256,
        "torch_dtype": "bfloat16",
        "vocab_size": 65024,
    },
}

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
NUMBERS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6}
SHRUNK = [f"model.config.{name}={value}" for name, value in {**SMALL, "vocab_size": 304}.items()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def copy(models: Models) -> Path:
    """A folder with the weights of a Qwen2.5 in miniature."""
    path = models.save("qwen2", **SMALL, **NUMBERS, tie_word_embeddings=True)
    models.tokenizer(None).save_pretrained(path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: Any) -> None:
        raise AssertionError(f"asked the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def small(copy: Path, *overrides: str) -> RunConfig:
    return compose_config("model=qwen2_5_0_5b", f"model.path={copy}", *SHRUNK, *overrides)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_model_has_as_many_parameters_as_were_published(
    name: str, cache: Path, no_network: None
) -> None:
    model = compose_config(f"model={name}").model
    model.check()
    assert model.facts(cache).num_parameters == PUBLISHED[name]
    assert model.path == model.hub
    assert model.saved_dtype in ("bfloat16", "float16", "float32")


@pytest.mark.parametrize("name", HUB_FILES)
def test_a_named_model_agrees_with_the_file_on_the_hub(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB_FILES[name]))
    model = compose_config(f"model={name}", f"model.path={tmp_path}").model
    assert model.hf_config().hidden_size == HUB_FILES[name]["hidden_size"]
    assert model.saved_dtype == "bfloat16"


def test_a_named_model_is_planned_without_the_network(
    models: Models, cache: Path, no_network: None
) -> None:
    words = ["model=qwen2_5_7b", "adapter=lora", "hardware=rtx4090x1", "mode=sft", "data=chat"]
    plan = make_plan(compose_config(*words, f"data.path={models.chat_rows}", f"cache_root={cache}"))
    assert plan.num_parameters == PUBLISHED["qwen2_5_7b"]
    assert (plan.weights_fingerprint, plan.optimizer) == ("Qwen/Qwen2.5-7B", "adamw")


def test_fresh_weights_are_another_run_with_the_tokenizer_of_the_data() -> None:
    named = compose_config("model=qwen2_5_0_5b")
    fresh = compose_config("model=qwen2_5_0_5b", "model.path=null")
    assert named.identity != fresh.identity
    assert (named.tokenizer_path, fresh.tokenizer_path) == ("Qwen/Qwen2.5-0.5B", None)
    assert fresh.data.tokenizer.vocab_size == 151936
    assert (fresh.model.saved_dtype, fresh.model.weights_fingerprint()) == (None, None)


def test_a_copy_of_the_weights_is_the_same_run_and_a_sister_is_not(tmp_path: Path) -> None:
    named = compose_config("model=qwen2_5_0_5b")
    sister = compose_config("model=qwen2_5_0_5b", "model.hub=Qwen/Qwen2.5-0.5B-Instruct")
    assert compose_config("model=qwen2_5_0_5b", f"model.path={tmp_path}").identity == named.identity
    assert sister.identity != named.identity
    assert sister.model.path == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_copy_is_trained_from_its_weights(copy: Path, cache: Path) -> None:
    from safetensors.torch import load_file

    model = small(copy, "train.seq_len=64").model
    built = model.build(torch.float32, "eager")
    stored = load_file(copy / "model.safetensors")
    assert torch.equal(built.lm_head.weight, stored["model.embed_tokens.weight"])
    assert model.facts(cache).num_parameters == built.num_parameters()


WRONG = {
    "model.config.num_hidden_layers=3": "model.config.num_hidden_layers=3 is 2 in the weights of",
    "model.config.rope_parameters.rope_theta=1e4": "model.config.rope_parameters={",
    "model=qwen3_0_6b model.config.head_dim=32": "model.architecture=qwen3 is qwen2 in the weights",
}


@pytest.mark.parametrize("line", WRONG)
@pytest.mark.parametrize("act", ["plan", "check", "build"])
def test_weights_of_another_model_are_refused_in_one_line(
    line: str, act: str, copy: Path, cache: Path
) -> None:
    model = small(copy, *line.split()).model
    acts: dict[str, Callable[[], Any]] = {
        "plan": lambda: model.facts(cache),
        "check": model.check_weights,
        "build": lambda: model.build(torch.float32, "eager"),
    }
    with pytest.raises(ConfigError) as refused:
        acts[act]()
    assert WRONG[line] in str(refused.value)
    assert f"take model=pretrained model.path={copy}" in str(refused.value)
    assert "\n" not in str(refused.value)
