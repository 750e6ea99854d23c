"""Cross-entropy over a vocabulary without a second copy of the logits."""

# B batch, L length, V vocabulary, T = B x L tokens, C tokens of a chunk

from typing import Any

import torch
from torch import Tensor

from llmtrain.kernel.walk import walk

CHUNK_TOKENS = 256  # 256 rows of fp32 logits stay in a core's cache up to some thousand words


class CrossEntropySum(torch.autograd.Function):
    """The loss of a chunk and its gradient are computed while the chunk is in cache.

    The gradient (softmax minus one-hot) is kept in the logits' own dtype, so the fp32 logits and
    the fp32 log-probabilities of the whole batch, which autograd would keep, never exist.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor) -> Tensor:  # type: ignore[override]
        grad_TV = torch.empty_like(logits_TV)
        total = logits_TV.new_zeros((), dtype=torch.float32)
        for number in walk(-(-len(labels_T) // CHUNK_TOKENS), logits_TV):
            chunk = slice(number * CHUNK_TOKENS, (number + 1) * CHUNK_TOKENS)
            total += chunk_loss(logits_TV[chunk], labels_T[chunk], grad_TV[chunk])
        ctx.save_for_backward(grad_TV)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (grad_TV,) = ctx.saved_tensors
        return grad_TV * grad.to(grad_TV.dtype), None


def chunk_loss(logits_CV: Tensor, labels_C: Tensor, grad_CV: Tensor) -> Tensor:
    """The summed loss of a chunk; its gradient is written into ``grad_CV``."""
    kept_C = labels_C >= 0
    index_C1 = labels_C.clamp(min=0)[:, None]
    log_probs_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    loss_C = -log_probs_CV.gather(1, index_C1)[:, 0]
    probs_CV = log_probs_CV.exp_()
    probs_CV.scatter_add_(1, index_C1, probs_CV.new_full(index_C1.shape, -1.0))
    torch.mul(probs_CV, kept_C[:, None], out=probs_CV)
    grad_CV.copy_(probs_CV)
    return (loss_C * kept_C).sum()


def cross_entropy_sum(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """The cross-entropy in nats, summed over all tokens whose label is not negative.

    Labels are aligned with logits (already shifted). Returns an fp32 scalar.
    """
    logits_TV, labels_T = logits_BLV.flatten(0, -2), labels_BL.flatten()
    if not logits_TV.requires_grad:
        return torch.nn.functional.cross_entropy(
            logits_TV.float(), labels_T.clamp(min=-100), ignore_index=-100, reduction="sum"
        )
    return CrossEntropySum.apply(logits_TV, labels_T)
