"""Mamba-2's scan in plain PyTorch for packed documents, which transformers' own cannot keep apart.

A token's output is what reaches it from its own chunk, as in attention with a decaying mask, and
from the state at the chunk's start. Every one of these paths is cut where it leaves a document.
"""

# B batch, L length, K chunks of T steps each (S as the source of a path), G groups that share B and
# C, R heads of a group, P channels of a head, N states of a channel.

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus


def chunked_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **unused: Any,
) -> Tensor:
    """The output of a state space with one decay a head: ``y_t = C_t h_t + D x_t``.

    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t`` with ``delta = clamp(softplus(dt + dt_bias),
    dt_limit)``, computed by chunks: section 6 of Dao and Gu, "Transformers are SSMs"
    (arXiv:2405.21060). A drop-in for transformers' ``mamba2_chunk_scan`` where neither an initial
    nor a final state is wanted.

    Shapes: hidden_states and the output [B, L, GR, P], dt [B, L, GR], A, D and dt_bias [GR], B and
    C [B, L, G, N]. ``seq_idx`` [B, L] numbers packed documents and never falls along a row; the
    state starts from zero where it changes. The arithmetic and the output are fp32, or fp64 for
    fp64 inputs.
    """
    length, num_groups = hidden_states.shape[1], B.shape[2]
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    with torch.autocast(hidden_states.device.type, enabled=False):
        step_BLH = softplus(dt.to(dtype) + dt_bias.to(dtype)).clamp(*dt_limit)
        x_BLHP = hidden_states.to(dtype)
        sources = (x_BLHP * step_BLH[..., None], step_BLH * A.to(dtype), B.to(dtype), C.to(dtype))
        steps = min(chunk_size, length)
        x_BKTHP, log_decay_BKTH, B_BKTGN, C_BKTGN = (_chunks(source, steps) for source in sources)
        y_BKTGRP = _recurrence(
            x_BKTHP.unflatten(3, (num_groups, -1)),
            log_decay_BKTH.unflatten(3, (num_groups, -1)),
            B_BKTGN,
            C_BKTGN,
            _chunks(seq_idx, steps),
        )
        y_BLHP = y_BKTGRP.flatten(3, 4).flatten(1, 2)[:, :length]
        return y_BLHP + D.to(dtype)[:, None] * x_BLHP


def _recurrence(
    x_BKTGRP: Tensor, log_decay_BKTGR: Tensor, B_BKTGN: Tensor, C_BKTGN: Tensor, seq_idx_BKT: Tensor
) -> Tensor:
    """[B, K, T, G, R, P]: ``C_t h_t`` with ``h_t = decay_t h_{t-1} + B_t x_t``."""
    last_BK = seq_idx_BKT[:, :, -1]
    before_BK = pad(last_BK[:, :-1], (1, 0), value=-1)  # no document: no state before the first
    is_path_BKTS = (seq_idx_BKT[..., None] == seq_idx_BKT[:, :, None]).tril()

    decay_BKTSGR = _exp(_sums_from(log_decay_BKTGR, is_path_BKTS.tril(-1)), is_path_BKTS)
    score_BKTSG = torch.einsum("bktgn,bksgn->bktsg", C_BKTGN, B_BKTGN)
    weight_BKTSGR = score_BKTSG[..., None] * decay_BKTSGR
    y_BKTGRP = torch.einsum("bktsgr,bksgrp->bktgrp", weight_BKTSGR, x_BKTGRP)

    to_end_BKTGR = decay_BKTSGR[:, :, -1]
    added_BKGRPN = torch.einsum("bktgrp,bktgn->bkgrpn", x_BKTGRP * to_end_BKTGR[..., None], B_BKTGN)
    sums_BKTGR = log_decay_BKTGR.cumsum(2)
    through_BKGR = _exp(sums_BKTGR[:, :, -1], last_BK == before_BK)
    starts_BKGRPN = _states_at_starts(added_BKGRPN, through_BKGR)
    from_start_BKTGR = _exp(sums_BKTGR, seq_idx_BKT == before_BK[..., None])
    carried_BKTGRP = torch.einsum("bktgn,bkgrpn->bktgrp", C_BKTGN, starts_BKGRPN)
    return y_BKTGRP + carried_BKTGRP * from_start_BKTGR[..., None]


def _sums_from(log_decay_BKTGR: Tensor, is_after_BKTS: Tensor) -> Tensor:
    """[B, K, T, S, G, R]: the sum of a document's log decays after step s, up to step t."""
    # The difference of two running sums would round, and not in one document alone.
    log_decay_BKTSGR = log_decay_BKTGR[:, :, :, None] * is_after_BKTS[..., None, None]
    return log_decay_BKTSGR.cumsum(2)


def _states_at_starts(added_BKGRPN: Tensor, through_BKGR: Tensor) -> Tensor:
    """The state before each chunk, from what each chunk adds and how much it lets through."""
    states = [torch.zeros_like(added_BKGRPN[:, 0])]
    for added, through in zip(added_BKGRPN.unbind(1), through_BKGR.unbind(1), strict=True):
        states.append(states[-1] * through[..., None, None] + added)
    return torch.stack(states[:-1], 1)


def _exp(log_decay: Tensor, is_path: Tensor) -> Tensor:
    """``exp``, and 0 where the path does not stay in one document."""
    return log_decay.exp() * is_path[..., None, None]


def _chunks(tensor_BL: Tensor, steps: int) -> Tensor:
    """[B, L, ...] as [B, K, T, ...], filled up with zeros, which leave the state as it is."""
    missing = -tensor_BL.shape[1] % steps
    return pad(tensor_BL, (0, 0) * (tensor_BL.dim() - 2) + (0, missing)).unflatten(1, (-1, steps))
