"""Cross-entropy over a vocabulary, whose logits exist for some tokens at a time."""

# B batch, L length, D width, V vocabulary, T = B x L tokens, C tokens of a chunk, R rows of a chunk

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from llmtrain.kernel import compiled, products
from llmtrain.kernel.compiled_cross_entropy import loss_and_gradient
from llmtrain.kernel.walk import walk

CHUNK_TOKENS = 256  # 256 rows of fp32 logits stay in a core's cache up to some thousand words
LEAST_TOKENS = 512  # of a chunk of hidden states: products of fewer are slower
MOST_CHUNKS = 8  # each of which rounds the sum of the head's gradient


def cross_entropy_of(head: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy in nats of ``head(features)``, over the tokens with a label >= 0.

    Labels are aligned with features (already shifted). Returns the sum, in fp32.
    """
    if not is_plain_linear(head) or features.dtype == torch.float16:
        return cross_entropy_sum(head(features), labels)
    features_TD, labels_T = features.reshape(-1, features.shape[-1]), labels.flatten()

    def loss(features_TD: Tensor, labels_T: Tensor) -> Tensor:
        weight_VD: Any = head.weight
        if not torch.is_grad_enabled():  # which the function itself cannot see
            weight_VD = weight_VD.detach()
        return LinearCrossEntropy.apply(features_TD, weight_VD, labels_T)  # type: ignore[no-any-return]

    # ZeRO-3 would gather a weight that is asked for by its name, and keep it for all of the step.
    if not any(hasattr(param, "ds_id") for param in head.parameters()):
        return loss(features_TD, labels_T)
    with patch.object(head, "forward", loss):  # ZeRO-3 has the whole weight in the head's call only
        return head(features_TD, labels_T)  # type: ignore[no-any-return]


def is_plain_linear(head: nn.Module) -> bool:
    """Whether logits are a product with one weight: without an adapter, a bias or a scale."""
    return type(head) is nn.Linear and head.bias is None


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss, chunk by chunk, so that logits need not be kept.

    In fp16 the head's gradient, a sum over all tokens, could pass the largest number before it is
    scaled; other dtypes hold it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        features_TD, weight_VD, labels_T = inputs
        dtype = features_TD.dtype
        if dtype is torch.bfloat16 and products.are_wide():  # cast once, not for each chunk
            features_TD, weight_VD = features_TD.float(), weight_VD.float()
        of_features, of_weight, _ = ctx.needs_input_grad
        of_features_TD = torch.empty_like(features_TD) if of_features else None
        of_weight_VD = torch.empty_like(weight_VD) if of_weight else None
        total = features_TD.new_zeros((), dtype=torch.float32)
        size = max(LEAST_TOKENS, -(-len(labels_T) // MOST_CHUNKS))
        if of_weight_VD is not None and not len(labels_T):
            of_weight_VD.zero_()
        for number in walk(-(-len(labels_T) // size), features_TD):
            chunk = slice(number * size, (number + 1) * size)
            features_CD = features_TD[chunk]
            grad_CV = torch.mm(features_CD, weight_VD.t())
            total += loss_in_place(grad_CV, labels_T[chunk])
            if of_features_TD is not None:
                torch.mm(grad_CV, weight_VD, out=of_features_TD[chunk])
            if of_weight_VD is not None and number == 0:
                torch.mm(grad_CV.t(), features_CD, out=of_weight_VD)
            elif of_weight_VD is not None:
                of_weight_VD.addmm_(grad_CV.t(), features_CD)
            del grad_CV  # or two chunks would be there at once
        made = (None if each is None else each.to(dtype) for each in (of_features_TD, of_weight_VD))
        ctx.gradients = tuple(made)  # made here: nothing could be saved twice
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were scaled in place, and serve once")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if each is None else each.mul_(grad.to(each.dtype)) for each in gradients)
        return (*scaled, None)


def loss_in_place(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """The summed loss; the logits become their gradient."""
    if compiled.is_for(logits_CV, "cross_entropy"):
        return loss_and_gradient(logits_CV, labels_C.long().contiguous()).sum()
    total = logits_CV.new_zeros((), dtype=torch.float32)
    for number in walk(-(-len(labels_C) // CHUNK_TOKENS), logits_CV):
        rows = slice(number * CHUNK_TOKENS, (number + 1) * CHUNK_TOKENS)
        total += chunk_loss(logits_CV[rows], labels_C[rows], logits_CV[rows])
    return total


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


def chunk_loss(logits_RV: Tensor, labels_R: Tensor, grad_RV: Tensor) -> Tensor:
    """The summed loss of some rows; their gradient is written into ``grad_RV``."""
    kept_R = labels_R >= 0
    index_R1 = labels_R.clamp(min=0)[:, None]
    log_probs_RV = torch.log_softmax(logits_RV, dim=-1, dtype=torch.float32)
    loss_R = -log_probs_RV.gather(1, index_R1)[:, 0]
    probs_RV = log_probs_RV.exp_()
    probs_RV.scatter_add_(1, index_R1, probs_RV.new_full(index_R1.shape, -1.0))
    torch.mul(probs_RV, kept_R[:, None], out=probs_RV)
    grad_RV.copy_(probs_RV)
    return (loss_R * kept_R).sum()


def cross_entropy_sum(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """The cross-entropy in nats, summed over all tokens whose label is not negative.

    Labels are aligned with logits (already shifted). Returns an fp32 scalar.
    """
    logits_TV, labels_T = logits_BLV.flatten(0, -2), labels_BL.flatten()
    if not logits_TV.requires_grad:
        total = logits_TV.new_zeros((), dtype=torch.float32)
        for rows in range(0, len(labels_T), CHUNK_TOKENS):  # in fp32 only some at a time
            logits_RV, labels_R = (
                each[rows : rows + CHUNK_TOKENS] for each in (logits_TV, labels_T)
            )
            total += torch.nn.functional.cross_entropy(
                logits_RV.float(), labels_R.clamp(min=-100), ignore_index=-100, reduction="sum"
            )
        return total
    return CrossEntropySum.apply(logits_TV, labels_T)
