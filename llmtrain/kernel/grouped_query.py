"""Grouped-query attention on GPUs where no flash kernel takes it.

Of torch's fused attention the flash kernels alone read one head of keys and values for several of
queries, and they are for 16 bits from Ampere on. The memory-efficient one wants as many heads of
keys as of queries; without that, torch falls back to plain products and a whole matrix of scores.
"""

from unittest.mock import _patch, patch


def wants_repeats(device: str, dtype: str) -> bool:
    """Whether keys and values have to be repeated: for fp32, and cards before Ampere train in fp16.

    So does fp16 that is asked for on a newer card, which could do without.
    """
    return device == "cuda" and dtype != "bfloat16"


def repeating() -> "_patch[object]":
    """Within (or once started), transformers' fused attention repeats them."""
    chosen_by = "transformers.integrations.sdpa_attention.use_gqa_in_sdpa"
    return patch(chosen_by, lambda *_: False)
