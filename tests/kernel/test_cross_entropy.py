"""The chunked cross-entropy gives the loss and the gradient of torch's own in double precision."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from llmtrain.kernel import compiled
from llmtrain.kernel.cross_entropy import (
    CHUNK_TOKENS,
    LEAST_TOKENS,
    cross_entropy_of,
    cross_entropy_sum,
)
from llmtrain.live import LiveTensors


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


def test_an_evaluation_has_few_logits_in_fp32_at_a_time() -> None:
    logits_TV = torch.randn(8 * CHUNK_TOKENS, 3000, dtype=torch.bfloat16)
    labels_T = labelled(len(logits_TV), 3000)
    account = LiveTensors()
    account.ignore([logits_TV])
    with account:
        found = cross_entropy_sum(logits_TV, labels_T)
    assert account.peak_bytes <= 3 * CHUNK_TOKENS * 3000 * 4
    exact = cross_entropy(logits_TV.double(), labels_T, reduction="sum")
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


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


# From hidden states, whose logits never exist for all tokens.


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def is_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(compiled, "is_on", request.param)
    return bool(request.param)


def head_of(width: int, words: int, dtype: torch.dtype = torch.float64) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(width, words, bias=False, dtype=dtype)


def labelled(num_tokens: int, words: int) -> torch.Tensor:
    labels_T = torch.randint(words, (num_tokens,))
    labels_T[::3] = -100
    return labels_T


@pytest.mark.parametrize("num_tokens", [0, 1, LEAST_TOKENS - 1, 2 * LEAST_TOKENS + 3])
@pytest.mark.parametrize("words", [5, 16, 50])
def test_loss_and_gradients_of_hidden_states_equal_those_of_all_logits(
    num_tokens: int, words: int, is_compiled: bool
) -> None:
    head, labels_T = head_of(6, words), labelled(num_tokens, words)
    features_TD = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
    leaves = [features_TD, head.weight]
    loss = 2 * cross_entropy_of(head, features_TD, labels_T)
    exact = 2 * cross_entropy(head(features_TD), labels_T, reduction="sum")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    found, expected = (torch.autograd.grad(of, leaves) for of in (loss, exact))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_large_and_not_finite_logits_are_as_torch_has_them(is_compiled: bool) -> None:
    head = head_of(4, 40, torch.float32)
    features_TD = 1e4 * torch.randn(6, 4)
    labels_T = torch.arange(6)
    exact = cross_entropy(head(features_TD), labels_T, reduction="sum")
    torch.testing.assert_close(cross_entropy_of(head, features_TD, labels_T), exact)
    features_TD[2, 1] = float("nan")
    assert cross_entropy_of(head, features_TD, labels_T).isnan()


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_none_either(is_compiled: bool) -> None:
    head, labels_T = head_of(6, 9), labelled(20, 9)
    features_TD = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    head.weight.requires_grad_(False)
    cross_entropy_of(head, features_TD, labels_T).backward()
    assert head.weight.grad is None and features_TD.grad is not None
    head.weight.requires_grad_(True)
    cross_entropy_of(head, features_TD.detach(), labels_T).backward()
    assert head.weight.grad is not None


def test_bf16_gradients_are_as_near_as_products_in_bf16(is_compiled: bool) -> None:
    head, labels_T = head_of(64, 500, torch.bfloat16), labelled(5000, 500)
    features_TD = torch.randn(5000, 64).bfloat16().requires_grad_()
    exact_head = head_of(64, 500)
    exact_head.weight.data = head.weight.data.double()
    cross_entropy_of(head, features_TD, labels_T).backward()
    whole = features_TD.detach().double()
    cross_entropy(exact_head(whole), labels_T, reduction="sum").backward()
    assert head.weight.grad is not None and exact_head.weight.grad is not None
    apart = (head.weight.grad.double() - exact_head.weight.grad).norm()
    assert apart < 5e-3 * exact_head.weight.grad.norm()


def test_a_weight_that_is_here_in_the_heads_call_alone_is_read_there(is_compiled: bool) -> None:
    """So ZeRO-3 has it, which gathers a module's weights before its call and drops them after."""
    head, labels_T = head_of(6, 9), labelled(2 * LEAST_TOKENS + 3, 9)
    features_TD = torch.randn(len(labels_T), 6, dtype=torch.float64, requires_grad=True)
    exact = cross_entropy_of(head, features_TD, labels_T)
    expected = torch.autograd.grad(exact, [features_TD, head.weight])
    whole, part = head.weight.data, torch.empty(0, dtype=torch.float64)
    head.weight.ds_id = 0  # type: ignore[attr-defined]
    head.weight.data = part
    head.register_forward_pre_hook(lambda *_: setattr(head.weight, "data", whole))
    head.register_forward_hook(lambda *_: setattr(head.weight, "data", part))
    loss = cross_entropy_of(head, features_TD, labels_T)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_of(head, features_TD, labels_T), loss)
    head.weight.data = whole
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, [features_TD, head.weight]), expected)
    assert "forward" not in vars(head)


def test_at_most_an_eighth_of_the_logits_is_there_at_once(is_compiled: bool) -> None:
    tokens, words = 8 * LEAST_TOKENS, 3000
    head = head_of(8, words, torch.bfloat16)
    features_TD = torch.randn(tokens, 8).bfloat16().requires_grad_()
    labels_T = labelled(tokens, words)
    account = LiveTensors()
    with account:
        cross_entropy_of(head, features_TD, labels_T).backward()
    gradients = features_TD.nbytes + head.weight.nbytes
    rows = 0 if is_compiled else 3 * CHUNK_TOKENS * words * 4  # in fp32
    logits = tokens * words * 2
    assert account.peak_bytes <= logits // 8 + rows + 2 * gradients + 2**16
