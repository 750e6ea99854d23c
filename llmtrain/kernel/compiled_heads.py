"""Mamba-2's scan on a CPU, by the C of ``heads.c``: each state is made in cache and used.

Autograd keeps the inputs and one state in ``CHUNK_STEPS``.
"""

# B batch, L length, H heads, P channels of a head, G groups that share B and C, N states of a
# channel, K chunks, V channels of a head filled up to whole vectors, S parts of a sequence's heads

import ctypes
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from llmtrain.kernel.compiled import (
    LANES,
    Strided,
    address,
    call,
    channels_last,
    dense,
    num_splits,
    readable,
    wide,
    zeros_if,
)

CHUNK_STEPS = 64

SIZES = ("batch", "length", "heads", "width", "groups", "states", "chunk_steps", "threads")
ARRAYS = ("delta", "decay", "B", "C", "skip", "starts")
WRITTEN = ("delta", "decay", "B", "C", "skip", "last")


class _Scan(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in SIZES],
        ("x", Strided),
        *[(name, c_void_p) for name in ARRAYS],
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [
        ("out", Strided),
        ("x", Strided),
        *[(name, c_void_p) for name in WRITTEN],
        ("splits", c_int64),
    ]


def scan_of(
    x_BDL: Tensor,
    delta_BLH: Tensor,
    decay_BLH: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    skip_H: Tensor | None,
    starts: Tensor,
) -> _Scan:
    batch, length, heads = delta_BLH.shape
    width, (groups, states) = x_BDL.shape[1] // heads, B_BLGN.shape[2:]
    sizes = (batch, length, heads, width, groups, states, CHUNK_STEPS, torch.get_num_threads())
    arrays = (delta_BLH, decay_BLH, B_BLGN, C_BLGN, skip_H, starts)
    return _Scan(*sizes, Strided.of(x_BDL), *map(address, arrays))


@torch.library.custom_op("llmtrain::compiled_heads", mutates_args=())
def forward(
    x_BDL: Tensor,
    delta_BLH: Tensor,
    decay_BLH: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    skip_H: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [B, D, L], the last state [B, H, N, V], those before chunks [K, B, H, N, V]."""
    made = out_BDL, last_BHNV, starts = empty_results(x_BDL, delta_BLH, decay_BLH, B_BLGN)
    scan = scan_of(x_BDL, delta_BLH, decay_BLH, B_BLGN, C_BLGN, skip_H, starts)
    last = c_void_p(last_BHNV.data_ptr())
    call("heads", "heads_forward", delta_BLH.dtype, byref(scan), byref(Strided.of(out_BDL)), last)
    return made


@forward.register_fake
def _(
    x_BDL: Tensor, delta_BLH: Tensor, decay_BLH: Tensor, B_BLGN: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(x_BDL, delta_BLH, decay_BLH, B_BLGN)


def empty_results(
    x_BDL: Tensor, delta_BLH: Tensor, decay_BLH: Tensor, B_BLGN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads = delta_BLH.shape
    filled = -(-(x_BDL.shape[1] // heads) // LANES) * LANES
    state = (batch, heads, B_BLGN.shape[3], filled)
    out_BDL = delta_BLH.new_empty(batch, length, x_BDL.shape[1]).transpose(1, 2)
    last, starts = (
        delta_BLH.new_empty(state),
        delta_BLH.new_empty(-(-length // CHUNK_STEPS), *state),
    )
    return out_BDL, last, starts


Made = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("llmtrain::compiled_heads_backward", mutates_args=())
def backward(
    grad_out_BDL: Tensor,
    grad_last_BHNV: Tensor,
    x_BDL: Tensor,
    delta_BLH: Tensor,
    decay_BLH: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    skip_H: Tensor | None,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, delta, decay, B and C [S, B, L, G, N], and D [B, H]."""
    made = empty_gradients(x_BDL, delta_BLH, B_BLGN)
    of_x, of_delta, of_decay, of_B, of_C, of_skip = made
    scan = scan_of(x_BDL, delta_BLH, decay_BLH, B_BLGN, C_BLGN, skip_H, starts)
    arrays = map(address, (of_delta, of_decay, of_B, of_C, of_skip, grad_last_BHNV))
    grads = _Gradients(Strided.of(grad_out_BDL), Strided.of(of_x), *arrays, len(of_B))
    call("heads", "heads_backward", delta_BLH.dtype, byref(scan), byref(grads))
    return made


@backward.register_fake
def _(
    grad_out_BDL: Tensor,
    grad_last_BHNV: Tensor,
    x_BDL: Tensor,
    delta_BLH: Tensor,
    decay_BLH: Tensor,
    B_BLGN: Tensor,
    *_: Any,
) -> Made:
    return empty_gradients(x_BDL, delta_BLH, B_BLGN)


def empty_gradients(x_BDL: Tensor, delta_BLH: Tensor, B_BLGN: Tensor) -> Made:
    batch, _, heads = delta_BLH.shape
    # Zeros: a part's heads may not meet every group.
    of_B, of_C = (B_BLGN.new_zeros(num_splits(batch, heads), *B_BLGN.shape) for _ in range(2))
    of_delta, of_decay = torch.empty_like(delta_BLH), torch.empty_like(delta_BLH)
    return channels_last(x_BDL), of_delta, of_decay, of_B, of_C, delta_BLH.new_empty(batch, heads)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # of the states, which nobody reads
    ctx.save_for_backward(*inputs, output[2])


def _backward(ctx: Any, grad_out_BDL: Tensor, grad_last: Tensor, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    grad_out_BDL = zeros_if(grad_out_BDL, channels_last(saved[0]), saved[1].dtype)
    grad_last = zeros_if(grad_last, saved[6][0], saved[1].dtype).contiguous()
    made = backward(grad_out_BDL, grad_last, *saved)
    of_x, of_delta, of_decay, of_B, of_C, of_skip = made
    has_skip = saved[5] is not None
    grads = (of_x, of_delta, of_decay, of_B.sum(0), of_C.sum(0))
    return (*grads, of_skip.sum(0) if has_skip else None)


forward.register_autograd(_backward, setup_context=_remember)


def scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    is_softplus: bool,
    dt_limit: tuple[float, float],
    is_continued_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output [B, L, H, P] and the last state [B, H, P, N], in fp32 (fp64 for fp64).

    As ``chunked_scan`` has them; ``is_continued_BL`` is false where the state starts from zero.
    """
    dtype = wide(hidden_states.dtype)
    heads, width = hidden_states.shape[2:]
    step_BLH = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta_BLH = (softplus(step_BLH) if is_softplus else step_BLH).clamp(*dt_limit)
    decay_BLH = (delta_BLH * A.to(dtype)).exp()
    if is_continued_BL is not None:
        decay_BLH = decay_BLH * is_continued_BL[..., None]
    x_BDL = readable(hidden_states, dtype).flatten(2).transpose(1, 2)
    delta_BLH, decay_BLH = delta_BLH.contiguous(), decay_BLH.contiguous()
    rest = (dense(B, dtype), dense(C, dtype), dense(D, dtype))
    out_BDL, last_BHNV, _ = forward(x_BDL, delta_BLH, decay_BLH, *rest)
    out_BLHP = out_BDL.transpose(1, 2).unflatten(2, (heads, width))
    return out_BLHP, last_BHNV[..., :width].transpose(2, 3)
