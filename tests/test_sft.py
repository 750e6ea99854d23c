"""What is learned from rows is the same however they lie in sequences, and whatever the model."""

# B batch, L length, V vocabulary

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmtrain.data.sequences import open_sequences
from llmtrain.kernel.mixers import install
from llmtrain.mode.base import Learner, Mode
from llmtrain.mode.pretrain import Pretrain
from llmtrain.mode.sft import SFT
from tests.data.test_packing import random_documents, write

IDS = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], None)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, **IDS}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES | ATTENTION,
    "qwen2": SIZES | ATTENTION | {"tie_word_embeddings": True},
    "gemma3_text": SIZES | ATTENTION | {"head_dim": 16, "sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, **IDS},
    "mamba": SIZES | {"state_size": 4},
    "mamba2": SIZES | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
}
VOCABULARY = 1200
Batch = dict[str, Tensor]


def tiny(architecture: str, **more: Any) -> Any:
    """A model in fp32 whose weights are large enough to have opinions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {"vocab_size": VOCABULARY, **FAMILIES.get(architecture, {}), **more}
    config = AutoConfig.for_model(architecture, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    install(architecture)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 2:
                param.mul_(3)
    return model.eval()  # without dropout


def batches(folder: Path, packing: bool) -> list[Batch]:
    """All rows of a split: packed in one batch, or padded in batches of three."""
    documents = random_documents(40, 32)
    folder.mkdir()
    sequences = open_sequences(write(folder, documents), "train", 32, packing=packing)
    size = len(sequences) if packing else 3
    parts = np.split(np.arange(len(sequences)), range(size, len(sequences), size))
    arrays = [sequences.batch(part) for part in parts]
    return [{name: torch.from_numpy(array) for name, array in item.items()} for item in arrays]


def learn(learner: Learner, mode: Mode, parts: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over some batches, and its gradients."""
    total, num_tokens = 0.0, 0
    for batch in parts:
        loss = mode.loss(learner, dict(batch))
        loss.loss_sum.backward()
        total, num_tokens = total + loss.loss_sum.item(), num_tokens + int(loss.num_tokens)
    gradients = {
        name: param.grad / num_tokens
        for name, param in learner.model.named_parameters()
        if param.grad is not None
    }
    learner.model.zero_grad()
    return total / num_tokens, gradients


@pytest.mark.parametrize("architecture", FAMILIES)
def test_packed_rows_teach_what_padded_rows_teach(architecture: str, tmp_path: Path) -> None:
    learner = Learner(tiny(architecture))
    packed, padded = batches(tmp_path / "one", True), batches(tmp_path / "two", False)
    assert len(packed[0]["labels"]) < 25  # of 40 rows
    loss, gradients = learn(learner, SFT(), packed)
    expected_loss, expected = learn(learner, SFT(), padded)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_the_loss_is_the_cross_entropy_of_the_learned_tokens(tmp_path: Path) -> None:
    model = tiny("llama")
    (batch,) = batches(tmp_path / "one", True)
    logits_BLV = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]
    expected = cross_entropy(logits_BLV.flatten(0, 1), batch["labels"].flatten())
    loss, gradients = learn(Learner(model), SFT(), [batch])
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, param in model.named_parameters():
        torch.testing.assert_close(gradients[name], param.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [Pretrain(), SFT()])
def test_a_mixture_learns_its_routers_balance_beside_the_text(mode: Mode) -> None:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model = tiny("mixtral", **SIZES, **ATTENTION, **more, router_aux_loss_coef=0.5)
    input_ids_BL = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids_BL, labels=input_ids_BL, use_cache=False)
    assert expected.aux_loss.item() > 1
    # transformers shifts labels itself and so reads one token that predicts nothing
    labels_BL = torch.nn.functional.pad(input_ids_BL[:, 1:], (0, 1), value=-100)
    loss = mode.loss(Learner(model), {"input_ids": input_ids_BL, "labels": labels_BL})
    assert int(loss.num_tokens) == 3 * 16
    mean = loss.loss_sum / loss.num_tokens + loss.penalty
    torch.testing.assert_close(mean, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.extras["router_balance_loss"], expected.aux_loss)


def test_a_model_that_caps_its_logits_is_read_through_its_own_head(tmp_path: Path) -> None:
    more = {"head_dim": 16, "final_logit_softcapping": 3.0}
    model = tiny("gemma2", **SIZES, **ATTENTION, **more)
    (batch,) = batches(tmp_path / "one", True)
    learner = Learner(model)
    assert learner.parts is None
    logits_BLV = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]
    expected = cross_entropy(logits_BLV.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    torch.testing.assert_close(SFT().loss(learner, batch).loss_sum, expected)
