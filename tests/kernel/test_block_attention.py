"""Attention by blocks against plain products over all keys, in float64 and in transformers."""

# B batch, H heads, L length, D width of a head

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.kernel.block_attention import BLOCK, block_attention, register


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(sum(shape))
    found = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(3))
    return [values.to(dtype).requires_grad_() for values in found]


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    scores = 0.3 * query @ key.mT
    scores = scores.masked_fill(~(seen if mask is None else mask), -math.inf)
    return scores.softmax(-1) @ value


def gradients(output: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    return torch.autograd.grad(output, leaves, weights)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_output_and_gradients_equal_plain_products(length: int) -> None:
    leaves = inputs(2, 3, length, 8)
    found, expected = block_attention(*leaves, 0.3), plain(*leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


def test_a_mask_hides_other_documents() -> None:
    length = BLOCK + 40
    document_L = torch.arange(length) // 50
    same = document_L[:, None] == document_L
    mask = (same & torch.ones(length, length, dtype=torch.bool).tril())[None, None].expand(
        2, -1, -1, -1
    )
    leaves = inputs(2, 3, length, 8)
    found, expected = block_attention(*leaves, 0.3, mask), plain(*leaves, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


def test_gradcheck_passes() -> None:
    assert torch.autograd.gradcheck(
        lambda *leaves: block_attention(*leaves, 0.3), inputs(1, 2, 5, 3)
    )


def test_bf16_is_as_near_as_plain_products_in_bf16() -> None:
    leaves = inputs(2, 2, 300, 64, dtype=torch.bfloat16)
    exact = plain(*(values.detach().double() for values in leaves))
    worst = [
        float((values.detach().double() - exact).abs().max())
        for values in (block_attention(*leaves, 0.3), plain(*leaves))
    ]
    assert worst[0] <= 2 * worst[1]


def test_nearly_half_of_the_products_are_left_out() -> None:
    leaves = inputs(1, 2, 8 * BLOCK, 4, dtype=torch.float32)

    def flops(attend: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            attend(*leaves).sum().backward()
        return int(counter.get_total_flops())

    share = flops(lambda *leaves: block_attention(*leaves, 0.3)) / flops(plain)
    assert share == 9 / 16  # of 8 blocks the first meets one block of keys, the last all eight


# In a model of transformers, whose keys and values have half as many heads.


def llama(attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    register()
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 60}
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation=attention)


IDS = torch.arange(2 * (BLOCK + 30)).view(2, -1) % 60


def logits_and_gradients(model: Any, **named: Any) -> list[Tensor]:
    logits_BLV = model(IDS, use_cache=False, **named).logits
    return [logits_BLV, *torch.autograd.grad(logits_BLV.square().mean(), model.parameters())]


def test_a_llama_has_the_same_logits_and_gradients() -> None:
    found = logits_and_gradients(llama("blocks"))
    torch.testing.assert_close(found, logits_and_gradients(llama("eager")), rtol=1e-4, atol=1e-6)


def test_a_llama_keeps_packed_documents_apart_as_with_other_attention() -> None:
    position_ids = (torch.arange(IDS.shape[1]) % 37).expand(2, -1)
    found = logits_and_gradients(llama("blocks"), position_ids=position_ids)
    expected = logits_and_gradients(llama("eager"), position_ids=position_ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_padding_is_hidden_as_with_other_attention() -> None:
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    found, expected = (
        llama(name)(IDS, attention_mask=mask, use_cache=False).logits[:, 9:]
        for name in ("blocks", "sdpa")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_generation_with_a_cache_is_as_with_other_attention() -> None:
    arguments: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found, expected = (
        llama(name).generate(IDS[:, :20], **arguments, eos_token_id=None)
        for name in ("blocks", "eager")
    )
    assert torch.equal(found, expected)
