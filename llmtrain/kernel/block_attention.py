"""Causal attention on a CPU, by blocks of queries: a block meets the keys up to its own end.

So nearly half of the products are left out, and a block's scores stay in cache. torch's fused
attention is as lean and slower; plain products over all keys are slower still.
"""

# B batch, H heads (K of keys and values), L length, D width of a head, T queries of a block, E keys
# up to a block's end, X = B x H

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAME = "blocks"  # transformers' name for it, once it is registered
BLOCK = 128  # queries: on two cores, products of fewer are slower, and more leave less out


def register() -> None:
    """Make it one of transformers' attention functions; causal masks are as for torch's own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """A layer's attention in transformers' form, query [B, H, L, D]: the output is [B, L, H, D].

    Where queries are not as many as keys (a cache is read), weights are dropped or scores are
    changed, torch's own.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    is_causal = named.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_whole = query.shape[2] == key.shape[2] and key.shape[-1] == value.shape[-1]
    is_masked = attention_mask is None or attention_mask.dtype == torch.bool
    has_more = any(named.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    if dropout or has_more or not (is_causal and is_whole and is_masked):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, **named
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (repeat_kv(each, groups) if groups > 1 else each for each in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output_BHLD = block_attention(query, key, value, scaling, attention_mask)
    return output_BHLD.transpose(1, 2).contiguous(), None


def block_attention(
    query_BHLD: Tensor,
    key_BHLD: Tensor,
    value_BHLD: Tensor,
    scaling: float,
    mask_B1LL: Tensor | None = None,
) -> Tensor:
    """``softmax(scaling q k') v`` over the keys up to each query: [B, H, L, D].

    ``mask_B1LL`` is false where a query sees no key; it hides more and shows nothing more.
    """
    output: Tensor = _BlockAttention.apply(query_BHLD, key_BHLD, value_BHLD, scaling, mask_B1LL)
    return output


class _BlockAttention(torch.autograd.Function):
    """The probabilities of each block are kept, in the dtype of the inputs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, scaling, mask_B1LL = inputs
        query_XLD = (query * scaling).flatten(0, 1)
        key_XLD, value_XLD = key.flatten(0, 1), value.flatten(0, 1)
        output_XLD = torch.empty_like(query_XLD)
        probs = []
        for block, seen in blocks(query.shape[2]):
            scores_XTE = torch.bmm(query_XLD[:, block], key_XLD[:, seen].mT)
            hide(scores_XTE, block, mask_B1LL)
            probs_XTE = torch.softmax(scores_XTE, -1)
            output_XLD[:, block] = torch.bmm(probs_XTE, value_XLD[:, seen])
            probs.append(probs_XTE)
        ctx.save_for_backward(query_XLD, key_XLD, value_XLD, *probs)
        ctx.scaling, ctx.shape = scaling, query.shape
        return output_XLD.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query_XLD, key_XLD, value_XLD, *probs = ctx.saved_tensors
        grad_XLD = grad.flatten(0, 1)
        of_query_XLD = torch.empty_like(query_XLD)
        # In fp32, as every block adds to the keys before it.
        of_key_XLD, of_value_XLD = (
            torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32))
            for each in (key_XLD, value_XLD)
        )
        for (block, seen), probs_XTE in zip(blocks(query_XLD.shape[1]), probs, strict=True):
            of_probs_XTE = torch.bmm(grad_XLD[:, block], value_XLD[:, seen].mT)
            of_scores_XTE = torch._softmax_backward_data(
                of_probs_XTE, probs_XTE, -1, of_probs_XTE.dtype
            )
            of_query_XLD[:, block] = torch.bmm(of_scores_XTE, key_XLD[:, seen])
            of_key_XLD[:, seen] += torch.bmm(of_scores_XTE.mT, query_XLD[:, block])
            of_value_XLD[:, seen] += torch.bmm(probs_XTE.mT, grad_XLD[:, block])
        found = (of_query_XLD * ctx.scaling, of_key_XLD, of_value_XLD)
        return (*(each.to(query_XLD.dtype).view(ctx.shape) for each in found), None, None)


def blocks(length: int) -> list[tuple[slice, slice]]:
    """Each block's queries, and the keys that one of them sees."""
    starts = range(0, length, BLOCK)
    ends = [min(start + BLOCK, length) for start in starts]
    return [(slice(start, end), slice(0, end)) for start, end in zip(starts, ends, strict=True)]


def hide(scores_XTE: Tensor, block: slice, mask_B1LL: Tensor | None) -> None:
    """Leave the least number where a query does not see a key; without a mask all before are seen.

    Not minus infinity: a query of padding sees no key at all, and would get no number.
    """
    least = torch.finfo(scores_XTE.dtype).min
    num_queries, num_keys = scores_XTE.shape[1:]
    if mask_B1LL is not None:
        mask_B1TE = mask_B1LL[:, :, block, :num_keys]
        batch = len(mask_B1TE)
        scores_XTE.view(batch, -1, num_queries, num_keys).masked_fill_(~mask_B1TE, least)
        return
    size = (num_queries, num_queries)
    is_later_TT = torch.ones(size, dtype=torch.bool, device=scores_XTE.device).triu(1)
    scores_XTE[:, :, block.start :].masked_fill_(is_later_TT, least)
