"""Mamba-1's selective scan, quick enough to train with where no CUDA kernel loads.

On a CPU with a compiler it is C (``compiled_scan``), elsewhere plain PyTorch, as follows.
Autograd over a Python loop records every step of the sequence and keeps every state. Here the loop
runs in place over short chunks and outside autograd: the forward pass keeps the state at each
chunk's start, and the backward pass computes a chunk's states again and walks it backwards.
"""

# B batch, L length, T steps of one chunk, D channels, N states of a channel, K chunks.
# Time leads, so that a step is one contiguous slice; channels are last, because they are many and
# every operation below runs along them.

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu, softplus

from llmtrain.kernel import compiled, compiled_scan
from llmtrain.kernel.walk import device_type, walk

CHUNK_STEPS = 16  # the states kept, L / 16 of N each, are then about as large as one activation
THREAD_GRAIN = 32768  # elements below which torch gives an elementwise operation to one thread


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    seq_idx: Tensor | None = None,
    **unused: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The output of a selective state space, and with ``return_last_state`` its final state.

    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t`` and ``y_t = (C_t h_t + D x_t) silu(z_t)``
    with ``delta = softplus(dt + delta_bias)``: sections 2, 3.2 and 3.4 of Gu and Dao, "Mamba"
    (arXiv:2312.00752), with ``delta B`` for the discrete B, as in their code. A drop-in for
    transformers' ``mamba_selective_scan``, whose choices of another scan (``use_mambapy`` and the
    like) are ignored.

    Shapes: hidden_states, dt, z and the output [B, D, L], A [D, N], B and C [B, N, L], D and
    delta_bias [D], the final state [B, D, N]. ``seq_idx`` [B, L] numbers packed documents; the
    state starts from zero where it changes. The output has the dtype of ``hidden_states``; all
    arithmetic and the state are fp32, or fp64 for fp64 inputs.
    """
    continued_BL = is_continued(seq_idx)
    if compiled.scans(hidden_states, "scan"):
        inputs = (hidden_states, dt, A, B, C, D, z, delta_bias, continued_BL)
        found = compiled_scan.scan(*inputs, delta_softplus)
        return found if return_last_state else found[0]
    scan: Any = _SelectiveScan.apply
    per_row = [hidden_states, dt, B, C, z, continued_BL]
    rows = _rows_at_once(hidden_states, num_states=A.shape[1])
    blocks = zip(*(_split(tensor, len(dt), rows) for tensor in per_row), strict=True)
    with torch.autocast(hidden_states.device.type, enabled=False):
        results = [
            scan(x, step, A, b, c, D, gate, delta_bias, continued, delta_softplus)
            for x, step, b, c, gate, continued in blocks
        ]
    outputs, last_states = zip(*results, strict=True)
    return (_join(outputs), _join(last_states)) if return_last_state else _join(outputs)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, is_softplus = arguments
        scan = _Scan.of(tensors, is_softplus)
        length, batch, channels = scan.x_LBD.shape
        spans = _spans(length)
        output_BLD = scan.x_LBD.new_empty(batch, length, channels)
        starts_KBND = scan.A_ND.new_empty(len(spans), *scan.state_shape)
        state_BND = scan.A_ND.new_zeros(scan.state_shape)
        for number in walk(len(spans), scan.x_LBD):
            span, start_BND = spans[number], starts_KBND[number]
            start_BND.copy_(state_BND)
            chunk = scan.chunk(span, start_BND)
            output_BLD.transpose(0, 1)[span] = chunk.gated(chunk.output())
            state_BND.copy_(chunk.states_TBND[-1])
        ctx.save_for_backward(*tensors, starts_KBND)
        ctx.is_softplus = is_softplus
        return output_BLD.transpose(1, 2), state_BND.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output_BDL: Tensor, grad_last_BDN: Tensor) -> tuple[Any, ...]:
        *tensors, starts_KBND = ctx.saved_tensors
        scan = _Scan.of(tensors, ctx.is_softplus)
        grads = _Gradients(scan, tensors, carry_BND=grad_last_BDN.transpose(1, 2).clone())
        grad_output_LBD = grad_output_BDL.permute(2, 0, 1)
        spans = _spans(scan.x_LBD.shape[0])
        with torch.autocast(grad_output_BDL.device.type, enabled=False):
            for number in walk(len(spans), scan.x_LBD):
                span, start_BND = spans[-1 - number], starts_KBND[-1 - number]
                chunk = scan.chunk(span, start_BND)
                grads.add(span, chunk, _dense(grad_output_LBD[span], scan.A_ND.dtype))
        return (*grads.of_inputs(), None, None)


@dataclass(frozen=True)
class _Chunk:
    """What the equations need of T steps, in the dtype of the arithmetic."""

    x_TBD: Tensor
    step_TBD: Tensor  # delta before the softplus
    delta_TBD: Tensor
    B_TBN: Tensor
    C_TBN: Tensor
    z_TBD: Tensor | None
    skip_D: Tensor | None
    decay_TBND: Tensor
    path_TBND: Tensor  # T + 1 states: the one before the first step, and the one after each

    @property
    def states_TBND(self) -> Tensor:
        return self.path_TBND[1:]

    def output(self) -> Tensor:
        """[T, B, D] before the gate."""
        output_TBD = _over_states(self.C_TBN, self.states_TBND)
        return output_TBD if self.skip_D is None else output_TBD.addcmul_(self.x_TBD, self.skip_D)

    def gated(self, values_TBD: Tensor) -> Tensor:
        return values_TBD if self.z_TBD is None else values_TBD * silu(self.z_TBD)


@dataclass(frozen=True)
class _Scan:
    """The inputs, time leading, and the memory that every chunk is computed in."""

    x_LBD: Tensor
    dt_LBD: Tensor
    A_ND: Tensor
    B_LBN: Tensor
    C_LBN: Tensor
    skip_D: Tensor | None
    z_LBD: Tensor | None
    bias_D: Tensor | None
    is_continued_LB: Tensor | None
    is_softplus: bool
    decay_TBND: Tensor
    path_TBND: Tensor

    @classmethod
    def of(cls, tensors: list[Any], is_softplus: bool) -> "_Scan":
        x_BDL, dt_BDL, A_DN, B_BNL, C_BNL, skip_D, z_BDL, bias_D, is_continued_BL = tensors
        dtype = torch.promote_types(x_BDL.dtype, torch.float32)
        A_ND = A_DN.t().to(dtype).contiguous()
        shape = (x_BDL.shape[0], *A_ND.shape)
        return cls(
            _time_major(x_BDL),
            _time_major(dt_BDL),
            A_ND,
            _time_major(B_BNL),
            _time_major(C_BNL),
            None if skip_D is None else skip_D.to(dtype),
            None if z_BDL is None else _time_major(z_BDL),
            None if bias_D is None else bias_D.to(dtype),
            None if is_continued_BL is None else is_continued_BL.t().to(dtype),
            is_softplus,
            decay_TBND=A_ND.new_empty(CHUNK_STEPS, *shape),
            path_TBND=A_ND.new_empty(CHUNK_STEPS + 1, *shape),
        )

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.decay_TBND.shape[1:])

    def chunk(self, span: slice, start_BND: Tensor) -> _Chunk:
        """The steps of ``span`` and their states; it overwrites the last chunk."""
        dtype = self.A_ND.dtype
        x_TBD, B_TBN = _dense(self.x_LBD[span], dtype), _dense(self.B_LBN[span], dtype)
        step_TBD = _dense(self.dt_LBD[span], dtype)
        if self.bias_D is not None:
            step_TBD += self.bias_D
        delta_TBD = softplus(step_TBD) if self.is_softplus else step_TBD
        decay_TBND = self.decay(span, delta_TBD)
        path_TBND = self.path_TBND[: len(x_TBD) + 1]
        path_TBND[0] = start_BND
        torch.mul(B_TBN[..., None], (delta_TBD * x_TBD)[:, :, None], out=path_TBND[1:])
        states, decays = path_TBND.unbind(), decay_TBND.unbind()
        for t in walk(len(decays), decay_TBND):
            states[t + 1].addcmul_(decays[t], states[t])
        z_TBD = None if self.z_LBD is None else _dense(self.z_LBD[span], dtype)
        C_TBN = _dense(self.C_LBN[span], dtype)
        return _Chunk(
            x_TBD, step_TBD, delta_TBD, B_TBN, C_TBN, z_TBD, self.skip_D, decay_TBND, path_TBND
        )

    def decay(self, span: slice, delta_TBD: Tensor) -> Tensor:
        """``exp(delta A)``, and 0 where a document starts."""
        decay_TBND = self.decay_TBND[: len(delta_TBD)]
        # On a CPU exp2 is much faster than exp.
        torch.mul(delta_TBD[:, :, None], self.A_ND * math.log2(math.e), out=decay_TBND).exp2_()
        if self.is_continued_LB is not None:
            decay_TBND.mul_(self.is_continued_LB[span][..., None, None])
        return decay_TBND


class _Gradients:
    """The gradient of each input, gathered chunk by chunk from the last to the first."""

    def __init__(self, scan: _Scan, inputs: list[Any], carry_BND: Tensor) -> None:
        self.inputs = inputs
        self.scan = scan
        self.carry_BND = carry_BND.to(scan.A_ND.dtype)  # of the state that a chunk ends in
        self.adjoint_TBND = torch.empty_like(scan.decay_TBND)
        x_BDL, dt_BDL, _, B_BNL, C_BNL, _, z_BDL, *_ = inputs
        self.x_BDL, self.dt_BDL = torch.empty_like(x_BDL), torch.empty_like(dt_BDL)
        self.B_BNL, self.C_BNL = torch.empty_like(B_BNL), torch.empty_like(C_BNL)
        self.z_BDL = None if z_BDL is None else torch.empty_like(z_BDL)
        self.A_ND = torch.zeros_like(scan.A_ND)
        self.skip_D, self.bias_D = scan.A_ND.new_zeros(2, scan.A_ND.shape[1])

    def add(self, span: slice, chunk: _Chunk, grad_output_TBD: Tensor) -> None:
        """Takes the gradient of the outputs of ``chunk`` to the inputs of its steps."""
        if self.z_BDL is not None:
            _time_major(self.z_BDL)[span] = self.of_gate(chunk, grad_output_TBD)
        grad_y_TBD = chunk.gated(grad_output_TBD)
        adjoint_TBND = self.adjoint(chunk, grad_y_TBD)
        update_TBD = chunk.delta_TBD * chunk.x_TBD
        _time_major(self.C_BNL)[span] = _over_channels(grad_y_TBD, chunk.states_TBND)
        _time_major(self.B_BNL)[span] = _over_channels(update_TBD, adjoint_TBND)
        grad_update_TBD = _over_states(chunk.B_TBN, adjoint_TBND)
        grad_x_TBD = grad_update_TBD * chunk.delta_TBD
        if chunk.skip_D is not None:
            grad_x_TBD.addcmul_(grad_y_TBD, chunk.skip_D)
            self.skip_D += (grad_y_TBD * chunk.x_TBD).sum((0, 1))
        _time_major(self.x_BDL)[span] = grad_x_TBD
        grad_delta_TBD = grad_update_TBD.mul_(chunk.x_TBD).add_(self.of_decay(chunk, adjoint_TBND))
        if self.scan.is_softplus:
            grad_delta_TBD.mul_(chunk.step_TBD.sigmoid())
        _time_major(self.dt_BDL)[span] = grad_delta_TBD
        self.bias_D += grad_delta_TBD.sum((0, 1))

    def of_gate(self, chunk: _Chunk, grad_output_TBD: Tensor) -> Tensor:
        assert chunk.z_TBD is not None
        gate_TBD = chunk.z_TBD.sigmoid()
        slope_TBD = gate_TBD * (1 + chunk.z_TBD * (1 - gate_TBD))
        return grad_output_TBD * chunk.output() * slope_TBD

    def adjoint(self, chunk: _Chunk, grad_y_TBD: Tensor) -> Tensor:
        """The gradient of each state: ``g_t = C_t dy_t + decay_{t+1} g_{t+1}``, backwards."""
        adjoint_TBND = self.adjoint_TBND[: len(grad_y_TBD)]
        torch.mul(chunk.C_TBN[..., None], grad_y_TBD[:, :, None], out=adjoint_TBND)
        adjoint_TBND[-1] += self.carry_BND
        steps, decays = adjoint_TBND.unbind(), chunk.decay_TBND.unbind()
        last = len(steps) - 1
        for number in walk(last, adjoint_TBND):
            t = last - number
            steps[t - 1].addcmul_(decays[t], steps[t])
        return adjoint_TBND

    def of_decay(self, chunk: _Chunk, adjoint_TBND: Tensor) -> Tensor:
        """Adds to the gradient of A and returns that of delta; both buffers are used up."""
        exponent_TBND = chunk.decay_TBND.mul_(adjoint_TBND)
        self.carry_BND.copy_(exponent_TBND[0])
        exponent_TBND.mul_(chunk.path_TBND[:-1])  # the gradient of delta A
        of_delta_TBD = torch.mul(exponent_TBND, self.scan.A_ND, out=adjoint_TBND).sum(2)
        self.A_ND += exponent_TBND.mul_(chunk.delta_TBD[:, :, None]).sum((0, 1))
        return of_delta_TBD

    def of_inputs(self) -> list[Tensor | None]:
        """In the order and the dtypes of the first eight inputs; none for an absent one."""
        rest = [self.A_ND.t(), self.B_BNL, self.C_BNL, self.skip_D, self.z_BDL, self.bias_D]
        pairs = zip([self.x_BDL, self.dt_BDL, *rest], self.inputs[:8], strict=True)
        return [None if of is None or grad is None else grad.to(of.dtype) for grad, of in pairs]


def _over_states(weight_TBN: Tensor, values_TBND: Tensor) -> Tensor:
    """``sum_n weight values``: [T, B, D]."""
    product = torch.bmm(weight_TBN.flatten(0, 1)[:, None], values_TBND.flatten(0, 1))
    return product.view(*values_TBND.shape[:2], -1)


def _over_channels(weight_TBD: Tensor, values_TBND: Tensor) -> Tensor:
    """``sum_d weight values``: [T, B, N]."""
    # The vector is the left factor: as the right one the same product is many times slower.
    product = torch.bmm(weight_TBD.flatten(0, 1)[:, None], values_TBND.flatten(0, 1).mT)
    return product.view(*values_TBND.shape[:2], -1)


def _time_major(tensor: Tensor) -> Tensor:
    """A view of [B, D, L] as [L, B, D]."""
    return tensor.permute(2, 0, 1)


def _dense(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with its last dimension contiguous; ``Tensor.to`` would keep the strides."""
    return values.new_empty(values.shape, dtype=dtype).copy_(values)


def _spans(length: int) -> list[slice]:
    return [slice(start, start + CHUNK_STEPS) for start in range(0, length, CHUNK_STEPS)]


def is_continued(seq_idx: Tensor | None) -> Tensor | None:
    """[B, L]: whether a token belongs to the document of the token before it."""
    if seq_idx is None:
        return None
    return torch.nn.functional.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0))


def _rows_at_once(x_BDL: Tensor, num_states: int) -> int:
    """On a CPU as few sequences as keep every thread at work, so that a chunk stays in cache."""
    batch, channels, _ = x_BDL.shape
    if device_type(x_BDL) != "cpu":
        return max(batch, 1)
    return max(1, round(torch.get_num_threads() * THREAD_GRAIN / max(channels * num_states, 1)))


def _split(tensor: Tensor | None, batch: int, rows: int) -> list[Tensor | None]:
    """Blocks of the batch. Split's backward joins the gradients without adding zeros."""
    if tensor is None:
        return [None] * math.ceil(max(batch, 1) / rows)
    return list(torch.split(tensor, rows)) if batch > rows else [tensor]


def _join(blocks: tuple[Tensor, ...]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
