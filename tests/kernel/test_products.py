"""On a CPU that multiplies fp32 faster, products of bf16 are made in fp32 and come out the same."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmtrain import choose, hardware, throughput
from llmtrain.kernel import products
from llmtrain.kernel.cross_entropy import LEAST_TOKENS, cross_entropy_of
from llmtrain.live import LiveTensors
from llmtrain.starting import peak_tflops
from tests.test_compose import compose_config
from tests.test_roofline import machine_of

FLAGS = {
    "vendor_id: GenuineIntel\nflags: avx512f avx512_bf16 amx_bf16 amx_tile": True,
    "vendor_id: GenuineIntel\nflags: avx512f avx512_bf16": False,
    "vendor_id: AuthenticAMD\nflags: avx512f avx512_bf16": True,
    "vendor_id: AuthenticAMD\nflags: avx2 fma": False,
    "Features: asimd bf16 i8mm": True,
    "": False,
}


@pytest.fixture
def wide() -> Iterator[None]:
    products.install()
    yield
    products.uninstall()


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


def seen(call: Any) -> list[str]:
    """The operations of a call, those inside of others, too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        call()
    return [event.key for event in found.key_averages()]


FORMS = {
    "mm": lambda a, b, c: torch.mm(a, b),
    "transposed": lambda a, b, c: torch.mm(b.t(), a.t()),
    "addmm": lambda a, b, c: torch.addmm(c, a, b, beta=0.5, alpha=2),
    "bias": lambda a, b, c: torch.addmm(c[0], a, b),
    "in place": lambda a, b, c: c.clone().addmm_(a, b, beta=2),
    "into": lambda a, b, c: torch.mm(a, b, out=torch.empty_like(c)),
    "into nothing": lambda a, b, c: torch.mm(a, b, out=c.new_empty(0)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_product_in_fp32_is_rounded_once(form: str, wide: None) -> None:
    a, b, c = numbers(200, 96), numbers(96, 130), numbers(200, 130)
    found = FORMS[form](a, b, c)
    exact = FORMS[form](a.double(), b.double(), c.double())
    assert found.dtype is torch.bfloat16
    # Half a unit of bf16's 8 bits, and what an fp32 sum of 96 terms may be off.
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def test_gradients_of_a_layer_are_those_of_torchs_own_products(wide: None) -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(96, 130, dtype=torch.bfloat16)
        x = numbers(4, 50, 96).requires_grad_()
        layer(x).square().sum().backward()
        return [each.grad.double() for each in (x, layer.weight, layer.bias)]  # type: ignore[union-attr]

    ours = gradients()
    products.uninstall()
    for mine, own in zip(ours, gradients(), strict=True):
        assert (mine - own).abs().max() <= own.abs().max() * 2**-6


def vocabulary_loss(num_chunks: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the loss over a vocabulary, and those of torch's own in double precision."""
    tokens = num_chunks * LEAST_TOKENS
    torch.manual_seed(0)
    head = torch.nn.Linear(96, 500, bias=False, dtype=torch.bfloat16)
    features_TD = numbers(tokens, 96).requires_grad_()
    labels_T = torch.arange(tokens) % 500
    cross_entropy_of(head, features_TD, labels_T).backward()
    exact = [each.detach().double().requires_grad_() for each in (features_TD, head.weight)]
    cross_entropy(exact[0] @ exact[1].t(), labels_T, reduction="sum").backward()
    return [features_TD.grad, head.weight.grad], [each.grad for each in exact]  # type: ignore[list-item]


def test_gradients_of_a_loss_over_a_vocabulary_are_rounded_once(wide: None) -> None:
    for found, exact in zip(*vocabulary_loss(num_chunks=3), strict=True):
        assert found.dtype is torch.bfloat16
        assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def test_a_loss_over_a_vocabulary_casts_the_same_however_many_chunks_it_takes(wide: None) -> None:
    def num_casts(num_chunks: int) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            vocabulary_loss(num_chunks)
        return sum(event.count for event in found.key_averages() if event.key == "aten::_to_copy")

    assert num_casts(1) == num_casts(4) > 0


def test_a_trace_of_the_loss_holds_what_the_loss_itself_does(wide: None) -> None:
    def peak_bytes() -> int:
        account = LiveTensors(has_wide_products=True)
        with account:
            vocabulary_loss(num_chunks=2)
        return account.peak_bytes

    taken = peak_bytes()
    products.uninstall()
    assert peak_bytes() == taken


def test_a_trace_for_another_machine_is_none_of_what_is_installed_here(wide: None) -> None:
    def peak_bytes() -> int:
        account = LiveTensors(has_wide_products=False)
        features_TD = numbers(2 * LEAST_TOKENS, 96).requires_grad_()
        head = torch.nn.Linear(96, 500, bias=False, dtype=torch.bfloat16)
        with account:
            cross_entropy_of(head, features_TD, torch.arange(len(features_TD)) % 500).backward()
        return account.peak_bytes

    taken = peak_bytes()
    products.uninstall()
    assert peak_bytes() == taken


@pytest.mark.parametrize("is_wide", [True, False])
def test_utilisation_is_a_share_of_the_products_that_are_made(
    is_wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"float32": 2.0, "bfloat16": 1.0}
    monkeypatch.setattr(throughput, "measure_matmul_tflops", lambda device, name: rates[name])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    told = {"dtype_name": "bfloat16", "has_wide_products": is_wide}
    plan: Any = SimpleNamespace(peak_tflops=None, device="cpu", **told)
    assert peak_tflops(plan, control=None) == (2.0 if is_wide else 1.0)


@pytest.mark.parametrize("rows", [1, 63])
def test_a_small_product_and_one_of_another_dtype_stay_torchs(rows: int, wide: None) -> None:
    small, enough = numbers(rows, 96), numbers(64, 96)
    columns = numbers(96, 130)
    assert "aten::to" not in seen(lambda: torch.mm(small, columns))
    assert "aten::to" in seen(lambda: torch.mm(enough, columns))
    large = (torch.randn(100, 96), torch.randn(96, 130))
    assert torch.mm(*large).dtype is torch.float32
    assert "aten::to" not in seen(lambda: torch.mm(*large))


def test_what_was_installed_can_be_taken_away() -> None:
    products.install()
    products.install()
    products.uninstall()
    factors = numbers(100, 96), numbers(96, 130)
    assert "aten::to" not in seen(lambda: torch.mm(*factors))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in torch's own code
def test_a_compiled_layer_takes_them_too(wide: None) -> None:
    layer = torch.nn.Linear(96, 130, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: torch.relu(layer(x)))
    x = numbers(128, 96)
    assert torch.equal(compiled(x), torch.relu(layer(x)))
    assert "aten::to" in seen(lambda: compiled(x))


@pytest.mark.parametrize("info", FLAGS)
def test_what_a_cpu_is_decides(info: str) -> None:
    def is_wide(*words: str, precision: str = "bf16", name: str = "cpux1") -> bool:
        machine = machine_of(name)
        return choose.choose_products(compose_config(*words), machine, precision, {})

    with patch.object(hardware, "cpu_info", lambda: info):
        assert is_wide() is not FLAGS[info]
        assert not is_wide("model.kernels=reference")
        assert not is_wide(precision="fp32")
        assert not is_wide(name="a800x1")
