"""Packed documents kept apart in state-space layers.

Attention is masked by transformers where position ids restart. A state-space layer has no mask: its
state and its short convolution run on from one document into the next. Here transformers' mixers
keep their own code, and the functions that carry a token's effect forward are given the documents.
"""

# B batch, L length, D channels, W taps of a convolution.

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# Attention of granitemoehybrid does not see position ids, so that its documents would mix there.
MAMBA_1 = ("falcon_mamba", "jamba", "mamba", "zamba")
MAMBA_2 = ("bamba", "falcon_h1", "mamba2", "nemotron_h", "zamba2")

_first_BL: "Tensor | None" = None  # the documents of the layer that runs now


def keeps_apart(model_type: str) -> bool:
    """Whether ``tell_documents`` serves this architecture of transformers with state spaces."""
    return model_type in MAMBA_1 + MAMBA_2


def tell_documents(model: "nn.Module", position_ids_BL: "Tensor | None") -> None:
    """Tells the state-space layers of ``model`` where the documents of the next batch start.

    A document starts where a position is 0 and where a row starts. What is told holds until the
    next call, and so when activations are recomputed in the backward pass; until then the model
    runs without a cache. None makes each row one document again, by transformers' own functions.
    Packed documents are always scanned by ours, whatever CUDA kernel is installed.
    """
    first_BL = None if position_ids_BL is None else _first_tokens(position_ids_BL)
    for layer in _state_space_layers(model):
        if first_BL is not None:
            _replace_functions(sys.modules[type(layer).__module__])
        if not hasattr(layer, "first_BL"):
            layer.register_forward_pre_hook(_enter, with_kwargs=True)
            layer.register_forward_hook(_leave, always_call=True)
        layer.first_BL = first_BL


def _state_space_layers(model: "nn.Module") -> Iterator[Any]:
    for module in model.modules():
        if hasattr(module, "A_log") and hasattr(module, "conv1d"):
            yield module


def _first_tokens(position_ids_BL: "Tensor") -> "Tensor":
    """[B, L]: where in its row a token's document starts, which numbers the documents, too."""
    import torch

    steps_L = torch.arange(position_ids_BL.shape[1], device=position_ids_BL.device)
    return torch.where(position_ids_BL == 0, steps_L, 0).cummax(1).values


def _enter(layer: Any, arguments: Any, named: dict[str, Any]) -> None:
    global _first_BL
    is_cached = named.get("cache_params") is not None
    assert layer.first_BL is None or not is_cached, "documents are told, and a cache is in use"
    _first_BL = layer.first_BL


def _leave(*_: Any) -> None:
    global _first_BL
    _first_BL = None


def _replace_functions(modeling: Any) -> None:
    """Puts our functions into a modeling module, for its layers that were told documents."""
    # The mixers look these globals up at each call. Another scan may have been installed since.
    for name, ours in OURS.items():
        own = getattr(modeling, name, None)
        if own is not None and not hasattr(own, "serves_documents"):
            setattr(modeling, name, _chosen(own, ours))


def _chosen(own: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def chosen(*arguments: Any, **named: Any) -> Any:
        if _first_BL is None:
            return own(*arguments, **named)
        return ours(*arguments, **named | {"seq_idx": _first_BL})

    chosen.serves_documents = True  # type: ignore[attr-defined]
    return chosen


def _convolution(
    x_BDL: "Tensor",
    weight_DW: "Tensor",
    bias_D: "Tensor | None" = None,
    activation: str | None = None,
    *,
    seq_idx: "Tensor",
    **unused: Any,
) -> "Tensor":
    """The causal depthwise convolution [B, D, L], in which a tap sees its own document only."""
    import torch
    from torch.nn.functional import pad
    from transformers.activations import ACT2FN

    from llmtrain.kernel import mixers

    length, taps = x_BDL.shape[2], weight_DW.shape[1]
    assert seq_idx.shape == (len(x_BDL), length), "the documents told are those of another batch"
    position_BL = torch.arange(length, device=seq_idx.device) - seq_idx
    if mixers.can_convolve(x_BDL, activation):
        return mixers.compiled_convolution(x_BDL, weight_DW, bias_D, activation, position_BL)
    dtype = torch.promote_types(x_BDL.dtype, torch.float32)
    padded_BDL = pad(x_BDL.to(dtype), (taps - 1, 0))
    y_BDL = padded_BDL.new_zeros(()) if bias_D is None else bias_D.to(dtype)[:, None]
    for tap, weight_D in enumerate(weight_DW.to(dtype).unbind(1)):
        is_seen_BL = position_BL >= taps - 1 - tap
        seen_BDL = padded_BDL[:, :, tap : tap + length] * weight_D[:, None]
        y_BDL = y_BDL + seen_BDL * is_seen_BL[:, None]
    if activation is not None:
        y_BDL = ACT2FN[activation](y_BDL)
    return y_BDL.to(x_BDL.dtype)


def _selective_scan(*arguments: Any, **named: Any) -> Any:
    from llmtrain.kernel.selective_scan import selective_scan

    return selective_scan(*arguments, **named)


def _chunked_scan(*arguments: Any, **named: Any) -> Any:
    from llmtrain.kernel import compiled, mixers
    from llmtrain.kernel.chunked_scan import chunked_scan

    if compiled.scans(arguments[0], "heads"):
        return mixers.compiled_mamba_2(*arguments, **named)[0]
    return chunked_scan(*arguments, **named)


def _no_fused_layer(*_: Any, **__: Any) -> None:
    """What transformers' own returns without a CUDA kernel: the mixer then takes its parts."""


# A global of transformers' modeling modules -> what it is where documents are told.
OURS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "mamba_selective_scan": _selective_scan,
    "mamba2_chunk_scan": _chunked_scan,
    "mamba_inner_fn": _no_fused_layer,
    "mamba2_split_conv1d_scan_combined": _no_fused_layer,
}
