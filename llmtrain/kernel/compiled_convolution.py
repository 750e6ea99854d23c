"""The short causal convolution of state-space layers on a CPU, by the C of ``convolution.c``."""

# B batch, L length, D channels, W taps

import ctypes
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from llmtrain.kernel.compiled import Strided, address, call, channels_last, dense, readable, wide

SIZES = ("batch", "length", "channels", "taps", "threads", "is_silu")


class _Convolution(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in SIZES],
        ("x", Strided),
        *[(name, c_void_p) for name in ("weight", "bias", "seen")],
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [("out", Strided), ("x", Strided), ("weight", c_void_p), ("bias", c_void_p)]


def convolution_of(
    x_BDL: Tensor, weight_WD: Tensor, bias_D: Tensor | None, seen_BL: Tensor | None, is_silu: bool
) -> _Convolution:
    batch, channels, length = x_BDL.shape
    sizes = (batch, length, channels, len(weight_WD), torch.get_num_threads(), is_silu)
    return _Convolution(*sizes, Strided.of(x_BDL), *map(address, (weight_WD, bias_D, seen_BL)))


@torch.library.custom_op("llmtrain::compiled_convolution", mutates_args=())
def forward(
    x_BDL: Tensor, weight_WD: Tensor, bias_D: Tensor | None, seen_BL: Tensor | None, is_silu: bool
) -> Tensor:
    """The convolution over time, after its SiLU where it has one: [B, D, L]."""
    out_BDL = channels_last(x_BDL)
    convolution = convolution_of(x_BDL, weight_WD, bias_D, seen_BL, is_silu)
    out = byref(Strided.of(out_BDL))
    call("convolution", "convolution_forward", weight_WD.dtype, byref(convolution), out)
    return out_BDL


@forward.register_fake
def _(x_BDL: Tensor, *_: Any) -> Tensor:
    return channels_last(x_BDL)


@torch.library.custom_op("llmtrain::compiled_convolution_backward", mutates_args=())
def backward(
    grad_out_BDL: Tensor,
    x_BDL: Tensor,
    weight_WD: Tensor,
    bias_D: Tensor | None,
    seen_BL: Tensor | None,
    is_silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, the weights [B, W, D] and the bias [B, D]."""
    made = of_x, of_weight, of_bias = empty_gradients(x_BDL, weight_WD)
    convolution = convolution_of(x_BDL, weight_WD, bias_D, seen_BL, is_silu)
    tensors = map(Strided.of, (grad_out_BDL, of_x))
    grads = _Gradients(*tensors, address(of_weight), address(of_bias))
    name = "convolution_backward"
    call("convolution", name, weight_WD.dtype, byref(convolution), byref(grads))
    return made


@backward.register_fake
def _(
    grad_out_BDL: Tensor, x_BDL: Tensor, weight_WD: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(x_BDL, weight_WD)


def empty_gradients(x_BDL: Tensor, weight_WD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_weight = weight_WD.new_empty(len(x_BDL), *weight_WD.shape)
    return channels_last(x_BDL), of_weight, weight_WD.new_empty(x_BDL.shape[:2])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out_BDL: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    of_x, of_weight, of_bias = backward(grad_out_BDL, *saved, ctx.is_silu)
    has_bias = saved[2] is not None
    return of_x, of_weight.sum(0), of_bias.sum(0) if has_bias else None, None, None


forward.register_autograd(_backward, setup_context=_remember)


def convolution(
    x_BDL: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    is_silu: bool,
    position_BL: Tensor | None,
) -> Tensor:
    """[B, D, L]; ``position_BL`` is a token's place in its document, whose taps see no other."""
    dtype, given, taps = wide(x_BDL.dtype), x_BDL.dtype, weight_DW.shape[1]
    seen_BL = None if position_BL is None else dense(position_BL.clamp(max=taps - 1), torch.uint8)
    inputs = (readable(x_BDL, dtype), dense(weight_DW.t(), dtype), dense(bias_D, dtype))
    return forward(*inputs, seen_BL, is_silu).to(given)
