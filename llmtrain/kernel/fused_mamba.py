"""What mamba-ssm's kernels for Mamba-1 keep and move, for plans of machines that have them.

Nothing here computes: the operators have shapes alone, and stand for the CUDA kernels where a model
is traced on tensors without values. What lives between forward and backward is what they save.
"""

# B batch, L length, D channels, N states of a channel, R rank of the time step

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

CHUNK_TOKENS = 2048  # of a sequence, for each of which the scan keeps its states
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@contextmanager
def standing_in(module: Any) -> Iterator[None]:
    """Let the layers of a transformers module call what stands here for mamba-ssm."""
    stand_ins = {"mamba_inner_fn": fused_layer, "mamba_selective_scan": fused_scan}
    with ExitStack() as stack:
        for name, function in stand_ins.items():
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, function))
        yield


def shapes_only(*_: Any) -> Any:
    raise NotImplementedError("plans call it on tensors without values")


@torch.library.custom_op("llmtrain::causal_conv1d", mutates_args=())
def convolution(x_BDL: Tensor, weight: Tensor, bias_D: Tensor | None) -> Tensor:
    """A short convolution over time and its SiLU, in one kernel."""
    return shapes_only()  # type: ignore[no-any-return]


@convolution.register_fake
def _(x_BDL: Tensor, weight: Tensor, bias_D: Tensor | None) -> Tensor:
    return torch.empty_like(x_BDL, memory_format=torch.contiguous_format)


@torch.library.custom_op("llmtrain::causal_conv1d_backward", mutates_args=())
def convolution_backward(
    x_BDL: Tensor, weight: Tensor, grad_BDL: Tensor, out_BDL: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias; that of x is put into ``out_BDL``."""
    return shapes_only()  # type: ignore[no-any-return]


@convolution_backward.register_fake
def _(x_BDL: Tensor, weight: Tensor, grad_BDL: Tensor, out_BDL: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, dtype=torch.float32), fp32(weight, len(weight))


@torch.library.custom_op("llmtrain::selective_scan", mutates_args=())
def scan(
    x_BDL: Tensor,
    delta_BDL: Tensor,
    A_DN: Tensor,
    B: Tensor,
    C: Tensor,
    skip_D: Tensor | None,
    z_BDL: Tensor | None,
    bias_D: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output before and after the gate, and the states between chunks [B, D, chunks, 2 N]."""
    return shapes_only()  # type: ignore[no-any-return]


@scan.register_fake
def _(
    x_BDL: Tensor,
    delta_BDL: Tensor,
    A_DN: Tensor,
    B: Tensor,
    C: Tensor,
    skip_D: Tensor | None,
    z_BDL: Tensor | None,
    bias_D: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, length = x_BDL.shape
    num_chunks = -(-length // CHUNK_TOKENS)
    states = fp32(x_BDL, batch, channels, num_chunks, 2 * A_DN.shape[1])
    shape = (batch, channels, length)
    return delta_BDL.new_empty(shape), states, delta_BDL.new_empty(shape)


@torch.library.custom_op("llmtrain::selective_scan_backward", mutates_args=())
def scan_backward(
    x_BDL: Tensor,
    delta_BDL: Tensor,
    A_DN: Tensor,
    B: Tensor,
    C: Tensor,
    z_BDL: Tensor | None,
    grad_BDL: Tensor,
    states: Tensor,
    out_BDL: Tensor,
) -> Gradients:
    """Gradients of x, delta, A, B, C, D and delta's bias, and the gated output once more.

    That of z is put into a tensor that the caller has.
    """
    return shapes_only()  # type: ignore[no-any-return]


@scan_backward.register_fake
def _(
    x_BDL: Tensor,
    delta_BDL: Tensor,
    A_DN: Tensor,
    B: Tensor,
    C: Tensor,
    z_BDL: Tensor | None,
    grad_BDL: Tensor,
    states: Tensor,
    out_BDL: Tensor,
) -> Gradients:
    shape, channels = x_BDL.shape, x_BDL.shape[1]
    return (
        x_BDL.new_empty(shape),
        delta_BDL.new_empty(shape),
        torch.empty_like(A_DN),
        torch.empty_like(B, dtype=torch.float32),
        torch.empty_like(C, dtype=torch.float32),
        fp32(x_BDL, channels),
        fp32(x_BDL, channels),
        x_BDL.new_empty(shape),
    )


def fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


class _Scan(torch.autograd.Function):
    """mamba-ssm's ``selective_scan_fn``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x_BDL, delta_BDL, A_DN, B, C, skip_D, z_BDL, bias_D = inputs
        out_BDL, states, gated_BDL = scan(*inputs)
        ctx.save_for_backward(x_BDL, delta_BDL, A_DN, B, C, z_BDL, states, out_BDL)
        ctx.has_skip, ctx.has_bias = skip_D is not None, bias_D is not None
        return out_BDL if z_BDL is None else gated_BDL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDL: Tensor) -> tuple[Any, ...]:
        x_BDL, delta_BDL, A_DN, B, C, z_BDL, states, out_BDL = ctx.saved_tensors
        made = scan_backward(x_BDL, delta_BDL, A_DN, B, C, z_BDL, grad_BDL, states, out_BDL)
        of_x, of_delta, of_A, of_B, of_C, of_skip, of_bias, _ = made
        of_z = None if z_BDL is None else z_BDL.new_empty(z_BDL.shape)
        of_skip, of_bias = of_skip if ctx.has_skip else None, of_bias if ctx.has_bias else None
        return of_x, of_delta, of_A, of_B.to(B.dtype), of_C.to(C.dtype), of_skip, of_z, of_bias


def fused_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Any:
    """In place of transformers' ``mamba_selective_scan``."""
    return _Scan.apply(hidden_states, dt, A, B, C, D, z, delta_bias)  # type: ignore[no-untyped-call]


class _Layer(torch.autograd.Function):
    """mamba-ssm's ``mamba_inner_fn``.

    The convolution and delta are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        xz, conv, conv_bias, to_dbl, to_delta, to_out, out_bias, A_DN, skip_D, bias_D = inputs
        x_BDL, z_BDL = xz.chunk(2, dim=1)
        conv_BDL = convolution(x_BDL, conv, conv_bias)
        dbl = linear(flat(conv_BDL), to_dbl)
        delta_BDL = delta_of(dbl, to_delta, xz)
        B, C = (part_of(dbl, to_delta, A_DN, xz, number) for number in range(2))
        out_BDL, states, gated = scan(conv_BDL, delta_BDL, A_DN, B, C, skip_D, z_BDL, bias_D)
        weights = (conv, conv_bias, to_dbl, to_delta, to_out, A_DN)
        ctx.save_for_backward(xz, *weights, dbl, B, C, states, out_BDL)
        ctx.has_out_bias = out_bias is not None
        return linear(gated.transpose(1, 2), to_out, out_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        xz, conv, conv_bias, to_dbl, to_delta, to_out, A_DN, dbl, B, C, states, out_BDL = saved
        rank = to_delta.shape[1]
        x_BDL, z_BDL = xz.chunk(2, dim=1)
        conv_BDL, delta_BDL = convolution(x_BDL, conv, conv_bias), delta_of(dbl, to_delta, xz)
        of_xz = torch.empty_like(xz)
        of_out = grad.reshape(-1, grad.shape[-1]).t()
        of_gated = as_BDL(to_out.t() @ of_out, xz)
        made = scan_backward(conv_BDL, delta_BDL, A_DN, B, C, z_BDL, of_gated, states, out_BDL)
        of_conv, of_delta, of_A, of_B, of_C, of_skip, of_bias, gated = made
        of_to_out = of_out @ flat(gated)
        of_dbl = torch.empty_like(dbl)
        of_dbl[:, rank:] = torch.cat([flat(of_B[:, 0]), flat(of_C[:, 0])], 1)
        of_delta = flat(of_delta).t()
        of_to_delta = of_delta @ dbl[:, :rank]
        of_dbl[:, :rank] = of_delta.t() @ to_delta
        of_to_dbl = of_dbl.t() @ flat(conv_BDL)
        of_conv = as_BDL(torch.addmm(flat(of_conv).t(), to_dbl.t(), of_dbl.t()), xz)
        of_weight, of_conv_bias = convolution_backward(x_BDL, conv, of_conv, of_xz)
        found = [of_xz, of_weight.to(conv.dtype), of_conv_bias.to(conv.dtype)]
        found[2] = None if conv_bias is None else found[2]  # type: ignore[call-overload]
        of_out_bias = grad.sum((0, 1)) if ctx.has_out_bias else None
        return (*found, of_to_dbl, of_to_delta, of_to_out, of_out_bias, of_A, of_skip, of_bias)


def fused_layer(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    **_: Any,
) -> Any:
    """In place of transformers' ``mamba_inner_fn``."""
    projections = (x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias)
    return _Layer.apply(xz, conv1d_weight, conv1d_bias, *projections, A, D, delta_bias)  # type: ignore[no-untyped-call]


def flat(values_BDL: Tensor) -> Tensor:
    """[B, D, L] as [B L, D]."""
    return values_BDL.transpose(1, 2).reshape(-1, values_BDL.shape[1])


def as_BDL(values: Tensor, like: Tensor) -> Tensor:
    """[D, B L] as [B, D, L]."""
    batch, _, length = like.shape
    return values.view(-1, batch, length).transpose(0, 1)


def delta_of(dbl: Tensor, to_delta: Tensor, xz: Tensor) -> Tensor:
    return as_BDL(to_delta @ dbl[:, : to_delta.shape[1]].t(), xz)


def part_of(dbl: Tensor, to_delta: Tensor, A_DN: Tensor, xz: Tensor, number: int) -> Tensor:
    """B (0) or C (1) of the projection: [B, 1, N, L]."""
    num_states = A_DN.shape[1]
    first = to_delta.shape[1] + number * num_states
    part = dbl[:, first : first + num_states].view(xz.shape[0], xz.shape[2], num_states)
    return part.transpose(1, 2)[:, None].contiguous()
