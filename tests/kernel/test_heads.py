"""A model is taken for a body and a head where they give its logits, and only there."""

# B batch, L length, D width

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmtrain.kernel.heads import plain_head


def model_of(architecture: str, **config: object) -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    options = {"num_key_value_heads": 2, "intermediate_size": 64, **config}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **sizes, **special, **options)
    )


def is_split_exactly(model: nn.Module) -> bool:
    parts = plain_head(model)
    assert parts is not None
    body, head = parts
    tokens_BL = torch.arange(12).view(2, 6)
    model.eval()
    hidden_BLD = body(input_ids=tokens_BL, use_cache=False).last_hidden_state
    return torch.equal(head(hidden_BLD), model(input_ids=tokens_BL, use_cache=False).logits)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mamba", "mixtral"])
def test_a_plain_model_is_split_into_a_body_and_a_head(architecture: str) -> None:
    assert is_split_exactly(model_of(architecture))


def test_a_mamba2_is_plain_too() -> None:
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    assert is_split_exactly(model_of("mamba2", **sizes))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_is_part_of_the_body_and_of_the_head() -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "lm_head"]
    options = {"init_lora_weights": False, "lora_dropout": 0.5}
    model = get_peft_model(model_of("llama"), LoraConfig(target_modules=targets, **options))
    model.train()
    assert is_split_exactly(model)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gemma2", {"head_dim": 16}),
        ("granite", {"logits_scaling": 8.0}),
        ("mixtral", {"output_router_logits": True}),
    ],
)
def test_a_model_that_changes_its_logits_or_adds_a_loss_is_not_plain(
    architecture: str, config: dict[str, object]
) -> None:
    model = model_of(architecture, **config)
    assert plain_head(model) is None
    assert all(module.training for module in model.modules())
