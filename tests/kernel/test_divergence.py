"""The chunked losses and their gradients equal those over whole logits, in little memory."""

# T tokens, D width, V vocabulary, K targets of a token

import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.kernel.divergence import (
    Divergence,
    TargetKind,
    cross_entropy_of_hidden,
    distillation_sum,
    sparse_sum,
)

BETA = 0.3


class Setting:
    """Hidden states of a student and a teacher, a head for each, and labels that have gaps."""

    def __init__(
        self,
        num_tokens: int = 150,
        vocab: int = 40,
        widths: tuple[int, int] = (8, 12),
        dtype: torch.dtype = torch.double,
    ) -> None:
        torch.manual_seed(0)
        student, teacher = widths
        self.student_TD = torch.randn(num_tokens, student, dtype=dtype, requires_grad=True)
        self.teacher_TD = torch.randn(num_tokens, teacher, dtype=dtype)
        self.student_head = nn.Linear(student, vocab, dtype=dtype)
        self.teacher_head = nn.Linear(teacher, vocab, dtype=dtype)
        self.labels_T = torch.randint(vocab, (num_tokens,))
        self.labels_T[::3] = -100

    def gradients(self, total: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(total, [self.student_TD, *self.student_head.parameters()])

    def chunked(self, divergence: Divergence, temperature: float, alpha: float) -> Tensor:
        return distillation_sum(
            self.student_TD,
            self.student_head,
            self.teacher_TD,
            self.teacher_head,
            self.labels_T,
            divergence=divergence,
            temperature=temperature,
            alpha=alpha,
            beta=BETA,
        ).total

    def sparse(
        self, ids_TK: Tensor, probs_TK: Tensor, kind: TargetKind, alpha: float = 1
    ) -> Tensor:
        student = [self.student_TD, self.student_head]
        options = {"kind": kind, "temperature": 2.0, "alpha": alpha}
        return sparse_sum(*student, ids_TK, probs_TK, self.labels_T, **options).total

    def whole(self, divergence: Divergence, temperature: float, alpha: float) -> Tensor:
        kept_T = self.labels_T >= 0
        logits_TV = self.student_head(self.student_TD)
        with torch.no_grad():
            teacher_TV = self.teacher_head(self.teacher_TD)
        distance_T = FORMULAS[divergence](
            (teacher_TV / temperature).log_softmax(-1), (logits_TV / temperature).log_softmax(-1)
        )
        learned = cross_entropy(logits_TV, self.labels_T, reduction="sum")
        return alpha * temperature**2 * (distance_T * kept_T).sum() + (1 - alpha) * learned


def kl(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    return kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1)


def jsd(log_teacher_TV: Tensor, log_student_TV: Tensor) -> Tensor:
    mixture_TV = (BETA * log_teacher_TV.exp() + (1 - BETA) * log_student_TV.exp()).log()
    return BETA * kl(log_teacher_TV, mixture_TV) + (1 - BETA) * kl(log_student_TV, mixture_TV)


FORMULAS: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    Divergence.forward_kl: kl,
    Divergence.reverse_kl: lambda teacher_TV, student_TV: kl(student_TV, teacher_TV),
    Divergence.jsd: jsd,
}


@pytest.mark.parametrize("divergence", Divergence)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_distillation_and_its_gradients_equal_the_formula_over_whole_logits(
    divergence: Divergence, temperature: float, alpha: float
) -> None:
    setting = Setting()
    chunked = setting.chunked(divergence, temperature, alpha)
    whole = setting.whole(divergence, temperature, alpha)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(setting.gradients(chunked), setting.gradients(whole))


def test_the_parts_of_the_loss_are_what_it_is_mixed_from() -> None:
    setting = Setting()
    inputs = [setting.student_TD, setting.student_head, setting.teacher_TD, setting.teacher_head]
    options = {"divergence": Divergence.reverse_kl, "temperature": 2.0, "alpha": 0.25, "beta": 0.5}
    total, divergence, learned = distillation_sum(*inputs, setting.labels_T, **options)
    torch.testing.assert_close(total, 0.25 * divergence + 0.75 * learned)
    alone = cross_entropy_of_hidden(setting.student_TD, setting.student_head, setting.labels_T)
    torch.testing.assert_close(learned, alone)
    assert setting.teacher_head.weight.grad is None


def test_columns_that_only_pad_one_vocabulary_are_not_compared() -> None:
    setting = Setting()
    expected = setting.whole(Divergence.forward_kl, 2.0, 1.0)
    padded = nn.Linear(12, 48, dtype=torch.double)
    padded.load_state_dict(
        {
            name: torch.cat([value, torch.randn(8, *value.shape[1:])])
            for name, value in setting.teacher_head.state_dict().items()
        }
    )
    setting.teacher_head = padded
    torch.testing.assert_close(setting.chunked(Divergence.forward_kl, 2.0, 1.0), expected)


def test_a_batch_without_labels_has_a_loss_and_gradients_of_zero() -> None:
    setting = Setting()
    setting.labels_T[:] = -100
    total = setting.chunked(Divergence.jsd, 1.0, 0.5)
    assert total == 0
    assert not any(gradient.any() for gradient in setting.gradients(total))


def test_cross_entropy_of_hidden_states_equals_that_of_whole_logits() -> None:
    setting = Setting()
    total = cross_entropy_of_hidden(setting.student_TD, setting.student_head, setting.labels_T)
    logits_TV = setting.student_head(setting.student_TD)
    whole = cross_entropy(logits_TV, setting.labels_T, reduction="sum")
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(setting.gradients(total), setting.gradients(whole))


def test_top_k_targets_compare_the_rest_as_one_more_token() -> None:
    setting = Setting()
    kept_T = setting.labels_T >= 0
    teacher_TV = (setting.teacher_head(setting.teacher_TD).detach() / 2).softmax(-1)
    probs_TK, ids_TK = teacher_TV.topk(5)
    total = setting.sparse(ids_TK, probs_TK, TargetKind.top_k)
    student_TV = (setting.student_head(setting.student_TD) / 2).softmax(-1)
    student_TK = student_TV.gather(1, ids_TK)
    buckets = [
        torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1).log()[kept_T]
        for top in (probs_TK, student_TK)
    ]
    whole = 4 * kl(*buckets).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(setting.gradients(total), setting.gradients(whole))


def test_a_sure_student_has_a_finite_gradient_where_the_rest_is_next_to_nothing() -> None:
    setting = Setting(num_tokens=2, dtype=torch.float32)
    setting.labels_T[:] = 0
    with torch.no_grad():
        setting.student_head.bias[:3] += 200
    ids_TK, probs_TK = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[0.5, 0.3, 0.1]] * 2)
    total = setting.sparse(ids_TK, probs_TK, TargetKind.top_k)
    assert total > 10
    assert all(gradient.isfinite().all() for gradient in setting.gradients(total))


def test_sampled_targets_give_the_gradient_of_the_full_forward_kl_on_average() -> None:
    setting = Setting(num_tokens=4)
    setting.labels_T[:] = 1
    teacher_TV = (setting.teacher_head(setting.teacher_TD).detach() / 2).softmax(-1)
    num_draws = 100_000
    ids_TK = teacher_TV.multinomial(num_draws, replacement=True)
    probs_TK = torch.full(ids_TK.shape, 1 / num_draws, dtype=torch.double)
    sampled = setting.gradients(setting.sparse(ids_TK, probs_TK, TargetKind.sampled))
    full = setting.gradients(setting.whole(Divergence.forward_kl, 2.0, 1.0))
    torch.testing.assert_close(sampled, full, rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_of_32k_takes_below_a_tenth_of_the_memory_of_whole_logits(
    dtype: torch.dtype,
) -> None:
    sizes = {"num_tokens": 2048, "vocab": 32768, "widths": (64, 64), "dtype": dtype}
    setting = Setting(**sizes)
    setting.labels_T.clamp_(min=0)
    with torch.device("meta"):  # the same operators, without the gigabytes
        whole = Setting(**sizes)
    most = peak_bytes(whole, whole.whole)
    assert most > 6 * 2048 * 32768 * dtype.itemsize  # of logits: no loss over whole ones is less
    assert peak_bytes(setting, setting.chunked) < 0.1 * most


def peak_bytes(setting: Setting, loss: Callable[..., Tensor]) -> int:
    """The most bytes of new tensors that a loss and its gradients have alive at once."""
    with LiveBytes() as live:
        setting.gradients(loss(Divergence.forward_kl, 2.0, 0.5))
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators return, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: WeakSet[UntypedStorage] = WeakSet()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return results

    def add(self, storage: UntypedStorage) -> None:
        if storage not in self.storages:
            self.storages.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, storage.nbytes())

    def remove(self, num_bytes: int) -> None:
        self.now -= num_bytes
