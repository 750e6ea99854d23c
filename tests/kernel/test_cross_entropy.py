"""The chunked cross-entropy gives the loss and the gradient of torch's own in double precision."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from llmtrain.kernel.cross_entropy import CHUNK_TOKENS, cross_entropy_sum


@pytest.mark.parametrize("num_tokens", [0, 1, 7, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_agree_with_double_precision(num_tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_TV = (3 * torch.randn(num_tokens, 50)).to(dtype).requires_grad_()
    labels_T = torch.randint(50, (num_tokens,))
    labels_T[::3] = -100
    exact_TV = logits_TV.detach().double().requires_grad_()
    loss = cross_entropy_sum(logits_TV, labels_T)
    exact = cross_entropy(exact_TV, labels_T, reduction="sum")
    (2 * loss).backward()
    (2 * exact).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-6)
    assert logits_TV.grad is not None and exact_TV.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits_TV.grad.double(), exact_TV.grad, atol=tolerance, rtol=0)


def test_the_loss_without_a_gradient_is_the_same() -> None:
    logits_BLV = torch.randn(2, 9, 30, requires_grad=True)
    labels_BL = torch.randint(30, (2, 9))
    labels_BL[0, :4] = -100
    with torch.no_grad():
        plain = cross_entropy_sum(logits_BLV.detach(), labels_BL)
    assert plain.item() == pytest.approx(cross_entropy_sum(logits_BLV, labels_BL).item(), rel=1e-6)


def test_only_the_gradient_is_kept_for_the_backward_pass() -> None:
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    logits_TV = torch.randn(512, 1000, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        cross_entropy_sum(logits_TV, torch.randint(1000, (512,)))
    assert kept == logits_TV.nbytes
