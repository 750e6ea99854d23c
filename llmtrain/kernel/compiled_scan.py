"""Mamba-1's selective scan on a CPU, by the C of ``scan.c``: each state is made in cache and used.

Autograd keeps the inputs and one state in ``CHUNK_STEPS``.
"""

# B batch, L length, D channels, N states of a channel, K chunks, S parts of a sequence's channels

import ctypes
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

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

CHUNK_STEPS = 16  # of which the states of 16 channels fit a core's first cache
SIZES = ("batch", "length", "channels", "states", "chunk_steps", "threads", "is_softplus")
ARRAYS = ("A", "B", "C", "skip", "bias", "is_continued", "starts")


class _Scan(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in SIZES],
        *[(name, Strided) for name in ("x", "dt", "z")],
        *[(name, c_void_p) for name in ARRAYS],
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [
        *[(name, Strided) for name in ("out", "x", "dt", "z")],
        *[(name, c_void_p) for name in ("last", "A", "B", "C", "skip", "bias")],
        ("splits", c_int64),
    ]


def scan_of(
    x_BDL: Tensor,
    dt_BDL: Tensor,
    A_ND: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    skip_D: Tensor | None,
    z_BDL: Tensor | None,
    bias_D: Tensor | None,
    is_continued_BL: Tensor | None,
    is_softplus: bool,
    starts_KBND: Tensor,
) -> _Scan:
    batch, channels, length = x_BDL.shape
    sizes = (batch, length, channels, len(A_ND), CHUNK_STEPS, torch.get_num_threads(), is_softplus)
    tensors = map(Strided.of, (x_BDL, dt_BDL, z_BDL))
    rest = (A_ND, B_BLN, C_BLN, skip_D, bias_D, is_continued_BL, starts_KBND)
    return _Scan(*sizes, *tensors, *map(address, rest))


@torch.library.custom_op("llmtrain::compiled_scan", mutates_args=())
def forward(
    x_BDL: Tensor,
    dt_BDL: Tensor,
    A_ND: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    skip_D: Tensor | None,
    z_BDL: Tensor | None,
    bias_D: Tensor | None,
    is_continued_BL: Tensor | None,
    is_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [B, D, L], the last state [B, N, D] and the states before chunks [K, B, N, D]."""
    inputs = (x_BDL, dt_BDL, A_ND, B_BLN, C_BLN, skip_D, z_BDL, bias_D, is_continued_BL)
    made = out_BDL, last_BND, starts_KBND = empty_results(x_BDL, A_ND)
    scan = scan_of(*inputs, is_softplus, starts_KBND)
    call(
        "scan",
        "scan_forward",
        A_ND.dtype,
        byref(scan),
        byref(Strided.of(out_BDL)),
        c_void_p(last_BND.data_ptr()),
    )
    return made


@forward.register_fake
def _(x_BDL: Tensor, dt_BDL: Tensor, A_ND: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(x_BDL, A_ND)


def empty_results(x_BDL: Tensor, A_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, length = x_BDL.shape
    num_chunks = -(-length // CHUNK_STEPS)
    last_BND = A_ND.new_empty(batch, *A_ND.shape)
    return channels_last(x_BDL), last_BND, A_ND.new_empty(num_chunks, batch, *A_ND.shape)


Made = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("llmtrain::compiled_scan_backward", mutates_args=())
def backward(
    grad_out_BDL: Tensor,
    grad_last_BND: Tensor,
    x_BDL: Tensor,
    dt_BDL: Tensor,
    A_ND: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    skip_D: Tensor | None,
    z_BDL: Tensor | None,
    bias_D: Tensor | None,
    is_continued_BL: Tensor | None,
    is_softplus: bool,
    starts_KBND: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, dt, A [B, N, D], B and C [S, B, L, N], D [B, D], z and the bias [B, D]."""
    inputs = (x_BDL, dt_BDL, A_ND, B_BLN, C_BLN, skip_D, z_BDL, bias_D, is_continued_BL)
    made = empty_gradients(x_BDL, dt_BDL, A_ND, z_BDL)
    of_x, of_dt, of_A, of_B, of_C, of_skip, of_z, of_bias = made
    scan = scan_of(*inputs, is_softplus, starts_KBND)
    tensors = map(Strided.of, (grad_out_BDL, of_x, of_dt, of_z))
    rest = map(address, (grad_last_BND, of_A, of_B, of_C, of_skip, of_bias))
    grads = _Gradients(*tensors, *rest, len(of_B))
    call("scan", "scan_backward", A_ND.dtype, byref(scan), byref(grads))
    return made


@backward.register_fake
def _(
    grad_out_BDL: Tensor,
    grad_last_BND: Tensor,
    x_BDL: Tensor,
    dt_BDL: Tensor,
    A_ND: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    skip_D: Tensor | None,
    z_BDL: Tensor | None,
    *_: Any,
) -> Made:
    return empty_gradients(x_BDL, dt_BDL, A_ND, z_BDL)


def empty_gradients(x_BDL: Tensor, dt_BDL: Tensor, A_ND: Tensor, z_BDL: Tensor | None) -> Made:
    batch, channels, length = x_BDL.shape
    splits = num_splits(batch, -(-channels // LANES))
    of_B, of_C = (A_ND.new_empty(splits, batch, length, len(A_ND)) for _ in range(2))
    of_skip, of_bias = (A_ND.new_empty(batch, channels) for _ in range(2))
    of_z = x_BDL.new_empty(0) if z_BDL is None else torch.empty_like(z_BDL)
    of_A = A_ND.new_empty(batch, *A_ND.shape)
    of_x, of_dt = torch.empty_like(x_BDL), torch.empty_like(dt_BDL)
    return of_x, of_dt, of_A, of_B, of_C, of_skip, of_z, of_bias


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.is_softplus = inputs
    ctx.set_materialize_grads(False)  # of the states, which nobody reads
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, grad_out_BDL: Tensor, grad_last_BND: Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, starts_KBND = ctx.saved_tensors
    x_BDL, dtype = tensors[0], starts_KBND.dtype
    grad_out_BDL = zeros_if(grad_out_BDL, x_BDL, x_BDL.dtype)
    grad_last_BND = zeros_if(grad_last_BND, starts_KBND[0], dtype).contiguous()
    made = backward(grad_out_BDL, grad_last_BND, *tensors, ctx.is_softplus, starts_KBND)
    of_x, of_dt, of_A, of_B, of_C, of_skip, of_z, of_bias = made
    summed = (of_A.sum(0), of_B.sum(0), of_C.sum(0), of_skip.sum(0))
    found = (of_x, of_dt, *summed, of_z, of_bias.sum(0))
    pairs = zip(tensors, found, strict=False)  # the last, documents' starts, has no gradient
    return (*(None if tensor is None else grad for tensor, grad in pairs), None, None)


forward.register_autograd(_backward, setup_context=_remember)


def scan(
    x_BDL: Tensor,
    dt_BDL: Tensor,
    A_DN: Tensor,
    B_BNL: Tensor,
    C_BNL: Tensor,
    skip_D: Tensor | None,
    z_BDL: Tensor | None,
    bias_D: Tensor | None,
    is_continued_BL: Tensor | None,
    is_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The output [B, D, L], in the dtype of ``x_BDL``, and the last state [B, D, N].

    As ``selective_scan`` has them; ``is_continued_BL`` is false where the state starts from zero.
    """
    dtype, given = wide(x_BDL.dtype), x_BDL.dtype
    x_BDL, dt_BDL, z_BDL = (readable(tensor, dtype) for tensor in (x_BDL, dt_BDL, z_BDL))
    B_BLN, C_BLN = (dense(tensor.transpose(1, 2), dtype) for tensor in (B_BNL, C_BNL))
    rest = (dense(skip_D, dtype), z_BDL, dense(bias_D, dtype), dense(is_continued_BL, torch.uint8))
    out_BDL, last_BND, _ = forward(
        x_BDL, dt_BDL, dense(A_DN.t(), dtype), B_BLN, C_BLN, *rest, is_softplus
    )
    return out_BDL.to(given), last_BND.transpose(1, 2)
