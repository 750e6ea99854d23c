"""Packed documents against the same documents run alone, in transformers' state-space models."""

# B batch, L length, V vocabulary.

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmtrain.kernel.mixers import install
from llmtrain.kernel.packed import MAMBA_1, MAMBA_2, keeps_apart, tell_documents

ARCHITECTURES = MAMBA_1 + MAMBA_2

# Documents' lengths. Some start within a chunk (of 16 steps for Mamba-1, of 8 for Mamba-2), some on
# its edge; some share a chunk, and some cross many.
ROWS = [[3, 37, 8, 1], [21, 2, 25, 1]]
VOCABULARY = 50
WIDTH = {"vocab_size": VOCABULARY, "hidden_size": 32}
IDS = dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], None)
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
HEADS_2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8}
CHUNKS_2 = {"mamba_chunk_size": 8}
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8}
ZAMBA_LAYERS = ["hybrid", "hybrid"]

TINY: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "jamba": {"mamba_d_state": 4, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"mamba_d_state": 4, "layers_block_type": ZAMBA_LAYERS},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "bamba": HEADS_2 | CHUNKS_2 | {"attn_layer_indices": [1]},
    "falcon_h1": HEADS_2 | CHUNKS_2 | {"mamba_d_ssm": 64},
    "nemotron_h": NEMOTRON | {"chunk_size": 8, "layers_block_type": ["mamba", "attention"]},
    "zamba2": {
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 2,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "layers_block_type": ZAMBA_LAYERS,
    },
}


def tiny(architecture: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = WIDTH | IDS | {"num_hidden_layers": 2}
    if architecture not in ("mamba", "falcon_mamba", "mamba2"):
        sizes |= ATTENTION
    if architecture == "nemotron_h":
        sizes |= {"head_dim": 16}
        del sizes["num_hidden_layers"]
    config = AutoConfig.for_model(architecture, **sizes | TINY[architecture])
    return AutoModelForCausalLM.from_config(config).train()


def documents() -> list[list[Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [[torch.randint(VOCABULARY, (size,), generator=random) for size in row] for row in ROWS]


def packed(rows: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Token ids and position ids, both [B, L]."""
    positions = [torch.cat([torch.arange(len(ids)) for ids in row]) for row in rows]
    return torch.stack([torch.cat(row) for row in rows]), torch.stack(positions)


def logits(model: Any, ids_BL: Tensor, position_ids_BL: Tensor | None = None) -> Tensor:
    tell_documents(model, position_ids_BL)
    return model(ids_BL, position_ids=position_ids_BL, use_cache=False).logits


def logits_of_documents(model: Any) -> list[Tensor]:
    """[L, V] of each document in a packed batch, row after row."""
    logits_BLV = logits(model, *packed(documents()))
    pairs = zip(logits_BLV, ROWS, strict=True)
    return [part for logits_LV, sizes in pairs for part in logits_LV.split(sizes)]


def logits_alone(model: Any) -> list[Tensor]:
    return [logits(model, ids[None])[0] for row in documents() for ids in row]


def gradients(model: Any, logits_LV: list[Tensor]) -> list[Tensor]:
    """Of the summed loss over the tokens that have a next one in their document."""
    ids = [ids for row in documents() for ids in row]
    losses = [
        cross_entropy(logits[:-1], ids[1:], reduction="sum")
        for logits, ids in zip(logits_LV, ids, strict=True)
    ]
    return list(torch.autograd.grad(torch.stack(losses).sum(), trained(model)))


def trained(model: Any) -> list[Tensor]:
    return [weight for weight in model.parameters() if weight.requires_grad]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_document_moves_no_logit(architecture: str) -> None:
    model, rows = tiny(architecture), documents()
    ids_BL, position_ids_BL = packed(rows)
    changed_BL, _ = packed([[(row[0] + 1) % VOCABULARY, *row[1:]] for row in rows])
    kept, moved = logits(model, ids_BL, position_ids_BL), logits(model, changed_BL, position_ids_BL)
    leaked = logits(model, ids_BL) - logits(model, changed_BL)
    for row, (first, *_) in enumerate(ROWS):
        assert torch.equal(kept[row, first:], moved[row, first:])
        assert not torch.equal(kept[row, :first], moved[row, :first])
        assert leaked[row, first:].abs().max() > 1e-5  # what it would be if nothing was told


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_document_has_the_logits_of_the_document_alone(architecture: str) -> None:
    model = tiny(architecture)
    torch.testing.assert_close(
        logits_of_documents(model), logits_alone(model), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("is_recomputed", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_the_sum_over_documents_alone(
    architecture: str, is_recomputed: bool
) -> None:
    model = tiny(architecture)
    expected = gradients(model, logits_alone(model))
    if is_recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, logits_of_documents(model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_keeps_its_documents_while_another_runs() -> None:
    student, teacher = tiny("mamba"), tiny("mamba")
    expected = gradients(student, logits_alone(student))
    student.activation_checkpointing_enable({"use_reentrant": False})
    parts = logits_of_documents(student)
    logits(teacher, torch.zeros(1, 5, dtype=torch.long))
    torch.testing.assert_close(gradients(student, parts), expected, rtol=1e-4, atol=1e-4)


def test_installing_a_scan_later_mixes_no_documents() -> None:
    model = tiny("mamba")
    expected = logits_of_documents(model)
    for kernel in ("compiled", "chunked", "transformers"):
        install("mamba", kernel)
        torch.testing.assert_close(logits_of_documents(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["mamba", "jamba", "mamba2", "bamba"])
def test_generation_is_as_before_once_no_documents_are_told(architecture: str) -> None:
    model, prompt = tiny(architecture).eval(), torch.arange(20).view(2, 10)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(prompt, **arguments)
    logits_of_documents(model)
    tell_documents(model, None)
    found = model.generate(prompt, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))


def test_a_cache_and_another_batch_are_refused_while_documents_are_told() -> None:
    model = tiny("mamba").eval()
    ids_BL, position_ids_BL = packed(documents())
    tell_documents(model, position_ids_BL)
    with pytest.raises(AssertionError, match="a cache is in use"):
        model(ids_BL, use_cache=True)
    with pytest.raises(AssertionError, match="those of another batch"):
        model(ids_BL[:1], use_cache=False)
    tell_documents(model, None)
    model(ids_BL[:1], use_cache=True)


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "qwen3_next", "rwkv"])
def test_architectures_whose_documents_would_mix_are_not_promised(model_type: str) -> None:
    assert not keeps_apart(model_type)


def test_asking_what_is_kept_apart_loads_no_torch() -> None:
    asked = "import sys; from llmtrain.kernel.packed import keeps_apart; keeps_apart('mamba')"
    lines = f"{asked}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], check=True)
