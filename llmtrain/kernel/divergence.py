"""Losses over a vocabulary, student against teacher, whose logits exist for one chunk at a time.

A head is called as a module on the hidden states of a chunk, once in the forward pass and once more
in the backward pass, so that adapters in it learn and ZeRO-3 gathers its weights.
"""

# T tokens, C tokens of a chunk, D width, V vocabulary, K targets of a token

import math
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # configs import the enums, and importing torch takes seconds
    from torch import Tensor, nn

MOST_CHUNKS = 32  # of a batch, so that a chunk's logits stay far below a tenth of all
LEAST_CHUNK_TOKENS = 64  # every chunk reads the head's weights, which fewer tokens would not repay
MOST_CHUNK_TOKENS = 1024  # enough for matrix products at a GPU's full speed


class Divergence(Enum):
    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"


class TargetKind(Enum):
    """What a teacher's K targets of a token are: its likeliest tokens, or draws from all."""

    top_k = "top_k"
    sampled = "sampled"


class DistillationSums(NamedTuple):
    """``total = alpha * divergence + (1 - alpha) * cross_entropy``; only it has a gradient.

    All are fp32 scalars in nats, summed over tokens; the divergence contains its factor T^2.
    """

    total: "Tensor"
    divergence: "Tensor"
    cross_entropy: "Tensor"


def cross_entropy_of_hidden(hidden_TD: "Tensor", head: "nn.Module", labels_T: "Tensor") -> "Tensor":
    """The cross-entropy in nats of ``head(hidden_TD)``, summed over tokens with a label >= 0.

    Labels are aligned with hidden states (already shifted). Returns an fp32 scalar.
    """

    def of_chunk(labels_C: "Tensor", hidden_CD: "Tensor") -> "Tensor":
        return cross_entropy(logits_of(head, hidden_CD), labels_C)

    return sum_over_chunks(of_chunk, [head], labels_T, hidden_TD)


def distillation_sum(
    student_hidden_TD: "Tensor",
    student_head: "nn.Module",
    teacher_hidden_TD: "Tensor",
    teacher_head: "nn.Module",
    labels_T: "Tensor",
    *,
    divergence: Divergence,
    temperature: float,
    alpha: float,
    beta: float,
) -> DistillationSums:
    """Divergence from a teacher mixed with cross-entropy, summed over tokens with a label >= 0.

    Both distributions are softened by ``temperature`` and the divergence is multiplied by its
    square, which keeps the size of gradients (Hinton et al., arXiv:1503.02531, section 2). It is
    KL(teacher || student); KL(student || teacher) (Gu et al., "MiniLLM", arXiv:2306.08543); or the
    generalised JSD (Agarwal et al., "GKD", arXiv:2306.13649, equation 1), where ``beta``, between
    0 and 1 exclusive, is the teacher's share of the mixture: JSD / beta becomes the forward KL as
    beta goes to 0. Vocabularies that are padded to different sizes are compared, renormalised, over
    the columns that both have; the cross-entropy is over all of the student's. The teacher gets no
    gradient.
    """
    import torch

    def of_chunk(labels_C: "Tensor", student_CD: "Tensor", teacher_CD: "Tensor") -> "Tensor":
        student_CV = logits_of(student_head, student_CD)
        with torch.no_grad():
            teacher_CV = logits_of(teacher_head, teacher_CD)
        shared = min(student_CV.shape[1], teacher_CV.shape[1])
        log_teacher_CV = (teacher_CV[:, :shared] / temperature).log_softmax(-1)
        log_student_CV = (student_CV[:, :shared] / temperature).log_softmax(-1)
        distance = distance_of(divergence, log_teacher_CV, log_student_CV, beta)
        return torch.stack([temperature**2 * distance, cross_entropy(student_CV, labels_C)])

    heads, rows = [student_head, teacher_head], [student_hidden_TD, teacher_hidden_TD]
    return mixed(sum_over_chunks(of_chunk, heads, labels_T, *rows), alpha)


def sparse_sum(
    student_hidden_TD: "Tensor",
    student_head: "nn.Module",
    ids_TK: "Tensor",
    probs_TK: "Tensor",
    labels_T: "Tensor",
    *,
    kind: TargetKind,
    temperature: float,
    alpha: float,
) -> DistillationSums:
    """As :func:`distillation_sum`, the forward KL from K probabilities of a teacher's vocabulary.

    They were taken at ``temperature``, T. With ``top_k`` all other tokens are one more bucket, the
    rest of the teacher against the rest of the student, so K must be below V. ``sampled`` are K
    draws of 1/K each (Anshumann et al., "Sparse Logit Sampling", arXiv:2503.16870), where a token
    may come twice: its gradient is that of the forward KL on average, its value is off by what
    does not depend on the student (the entropy of the teacher and of the draws).
    """
    import torch

    def of_chunk(labels_C: "Tensor", student_CD: "Tensor", *targets: "Tensor") -> "Tensor":
        ids_CK, probs_CK = targets
        student_CV = logits_of(student_head, student_CD)
        log_student_CV = (student_CV / temperature).log_softmax(-1)
        log_student_CK = log_student_CV.gather(1, ids_CK)
        if kind is TargetKind.top_k:
            assert ids_CK.shape[1] < student_CV.shape[1]
            rest_C1 = (1 - probs_CK.sum(-1, keepdim=True)).clamp(min=0)
            probs_CK = torch.cat([probs_CK, rest_C1], dim=-1)
            # Not log1p(-sum): where the K have nearly everything, that is all rounding.
            others_CV = log_student_CV.scatter(1, ids_CK, -math.inf)
            log_rest_C1 = others_CV.logsumexp(-1, keepdim=True)
            log_student_CK = torch.cat([log_student_CK, log_rest_C1], dim=-1)
        distance = (torch.xlogy(probs_CK, probs_CK) - probs_CK * log_student_CK).sum()
        return torch.stack([temperature**2 * distance, cross_entropy(student_CV, labels_C)])

    rows = [student_hidden_TD, ids_TK, probs_TK]
    return mixed(sum_over_chunks(of_chunk, [student_head], labels_T, *rows), alpha)


def distance_of(
    divergence: Divergence, log_teacher_CV: "Tensor", log_student_CV: "Tensor", beta: float
) -> "Tensor":
    """The divergence of two tensors of log-probabilities, summed over tokens."""
    if divergence is Divergence.forward_kl:
        return kl(log_teacher_CV, log_student_CV)
    if divergence is Divergence.reverse_kl:
        return kl(log_student_CV, log_teacher_CV)
    assert 0 < beta < 1
    log_mixture_CV = (log_teacher_CV + math.log(beta)).logaddexp(log_student_CV + math.log1p(-beta))
    to_teacher, to_student = kl(log_teacher_CV, log_mixture_CV), kl(log_student_CV, log_mixture_CV)
    return beta * to_teacher + (1 - beta) * to_student


def kl(log_p_CV: "Tensor", log_q_CV: "Tensor") -> "Tensor":
    """``KL(p || q)``, summed over tokens."""
    return (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum()


def cross_entropy(logits_CV: "Tensor", labels_C: "Tensor") -> "Tensor":
    return (logits_CV.logsumexp(-1) - logits_CV.gather(1, labels_C[:, None])[:, 0]).sum()


def logits_of(head: "nn.Module", hidden_CD: "Tensor") -> "Tensor":
    """Logits in fp32, or in fp64 from a head in fp64."""
    import torch

    logits_CV = head(hidden_CD)
    return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))


def mixed(sums: "Tensor", alpha: float) -> DistillationSums:
    divergence, cross_entropy = sums.unbind()
    total = alpha * divergence + (1 - alpha) * cross_entropy
    return DistillationSums(total, divergence.detach(), cross_entropy.detach())


def sum_over_chunks(
    of_chunk: "Callable[..., Tensor]",
    heads: "list[nn.Module]",
    labels_T: "Tensor",
    *rows: "Tensor",
) -> "Tensor":
    """The sum of ``of_chunk(labels_C, *rows_C)`` over chunks of the tokens that have a label."""
    import torch
    from torch.utils.checkpoint import checkpoint

    kept = (labels_T >= 0).nonzero()[:, 0]
    sizes = chunk_sizes(len(kept), are_partitioned(heads))
    chunks = [row.index_select(0, kept).split(sizes) for row in (labels_T, *rows)]
    sums = [
        checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in zip(*chunks, strict=True)
    ]
    return torch.stack(sums).sum(0)


def chunk_sizes(num_tokens: int, is_fixed: bool) -> list[int]:
    """Nearly equal sizes, some perhaps 0; as many for any count of tokens if ``is_fixed``."""
    chunk_tokens = min(max(num_tokens // MOST_CHUNKS, LEAST_CHUNK_TOKENS), MOST_CHUNK_TOKENS)
    num_chunks = MOST_CHUNKS if is_fixed else max(1, math.ceil(num_tokens / chunk_tokens))
    return [len(range(first, num_tokens, num_chunks)) for first in range(num_chunks)]


def are_partitioned(heads: "list[nn.Module]") -> bool:
    """Whether ZeRO-3 gathers a head's weights at each call.

    Ranks gather together, so they must call a head equally often, however many labels each has.
    """
    return any(hasattr(param, "ds_id") for head in heads for param in head.parameters())
