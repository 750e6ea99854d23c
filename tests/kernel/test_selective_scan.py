"""Both scans, C and PyTorch, against a plain loop in float64 and transformers' own function."""

# B batch, L length, D channels, N states of a channel, V vocabulary.

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from llmtrain.compiler import compiler
from llmtrain.kernel import compiled
from llmtrain.kernel import selective_scan as module
from llmtrain.kernel.mixers import install
from llmtrain.kernel.selective_scan import CHUNK_STEPS, selective_scan


@pytest.fixture(params=["compiled", "chunked"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "compiled" and compiler() is None:
        pytest.skip("needs a C compiler: cc, gcc or clang")
    monkeypatch.setattr(compiled, "is_on", request.param == "compiled")
    return str(request.param)


NAMES = ["hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias"]


def inputs(
    batch: int, length: int, channels: int, states: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    per_channel, per_state = (batch, channels, length), (batch, states, length)
    tensors = {name: normal(*per_channel) for name in ("hidden_states", "dt", "z")}
    tensors |= {"B": normal(*per_state), "C": normal(*per_state)}
    tensors |= {"A": -normal(channels, states).exp()}
    tensors |= {"D": normal(channels), "delta_bias": normal(channels)}
    return {name: tensors[name].requires_grad_() for name in NAMES}


def loop(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition, a step at a time."""
    delta = softplus(dt + delta_bias[:, None])
    state = torch.zeros(*hidden_states.shape[:2], A.shape[1], dtype=hidden_states.dtype)
    outputs = []
    for t in range(dt.shape[2]):
        decay = torch.exp(delta[:, :, t, None] * A)
        added = delta[:, :, t, None] * B[:, None, :, t] * hidden_states[:, :, t, None]
        state = decay * state + added
        outputs.append((state * C[:, None, :, t]).sum(-1))
    output = torch.stack(outputs, -1) + D[:, None] * hidden_states
    return output * silu(z), state


def ours(**tensors: Any) -> tuple[Tensor, Tensor]:
    result = selective_scan(**tensors, delta_softplus=True, return_last_state=True)
    assert isinstance(result, tuple)
    return result


def gradients(results: tuple[Tensor, Tensor], tensors: dict[str, Any]) -> tuple[Tensor, ...]:
    weights = [
        torch.linspace(-1, 1, result.numel()).view_as(result).to(result) for result in results
    ]
    return torch.autograd.grad(results, list(tensors.values()), weights)


def assert_agree(tensors: dict[str, Any]) -> None:
    expected, found = loop(**tensors), ours(**tensors)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 1, 3, 4), (3, CHUNK_STEPS, 5, 2), (2, CHUNK_STEPS + 1, 7, 3), (1, 53, 2, 5)],
)
def test_output_state_and_every_gradient_equal_the_loop(shape: tuple[int, int, int, int]) -> None:
    assert_agree(inputs(*shape))


def test_a_long_sequence_equals_the_loop() -> None:
    assert_agree(inputs(1, 2000, 3, 2))


@pytest.mark.parametrize("shift", [-60.0, 40.0])
def test_extreme_step_sizes_equal_the_loop(shift: float) -> None:
    tensors = inputs(2, 21, 3, 4)
    tensors["dt"] = (tensors["dt"].detach() + shift).requires_grad_()
    assert_agree(tensors)


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (2, 70, 17, 16), (1, 33, 40, 3)])
@pytest.mark.parametrize("shift", [-12.0, 0.0, 6.0])
def test_fp32_is_as_near_to_float64_as_its_rounding(
    shape: tuple[int, int, int, int], shift: float
) -> None:
    exact = inputs(*shape)
    exact["dt"] = (exact["dt"].detach() + shift).requires_grad_()
    single = {name: values.detach().float().requires_grad_() for name, values in exact.items()}
    exact = {name: values.detach().double().requires_grad_() for name, values in single.items()}
    expected, found = loop(**exact), ours(**single)
    close: Any = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(found, expected, **close)
    for ours_, theirs in zip(gradients(found, single), gradients(expected, exact), strict=True):
        torch.testing.assert_close(
            ours_, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()), check_dtype=False
        )


def test_what_is_not_finite_stays_so() -> None:
    tensors = inputs(1, 20, 18, 3, torch.float32)
    tensors["hidden_states"].data[0, 17, 4] = float("nan")
    output, state = ours(**tensors)
    assert output[0, 17, 4:].isnan().all() and state[0, 17].isnan().all()
    assert output[0, :17].isfinite().all()


def test_a_batch_that_is_cut_into_blocks_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rows_at_once", lambda *_, **__: 2)
    assert_agree(inputs(5, 19, 3, 2))


def test_gradcheck_passes_in_float64() -> None:
    tensors = inputs(2, CHUNK_STEPS + 2, 2, 2)
    assert torch.autograd.gradcheck(
        lambda *values: ours(**dict(zip(NAMES, values, strict=True))), list(tensors.values())
    )


def test_what_is_optional_may_be_absent() -> None:
    tensors = {name: tensor for name, tensor in inputs(2, 19, 3, 4).items() if name in NAMES[:5]}
    tensors["dt"] = softplus(tensors["dt"].detach()).requires_grad_()
    found: Any = selective_scan(**tensors)
    before_softplus = torch.log(torch.expm1(tensors["dt"]))
    ones, zeros = torch.full((2, 3, 19), 40.0), torch.zeros(3)  # silu(40) is 40
    expected, _ = loop(**tensors | {"dt": before_softplus}, D=zeros, z=ones, delta_bias=zeros)
    torch.testing.assert_close(found, expected / 40)
    assert all(
        grad is not None for grad in torch.autograd.grad(found.sum(), list(tensors.values()))
    )


def test_an_empty_sequence_leaves_the_state_at_zero() -> None:
    output, state = ours(**inputs(2, 0, 3, 4))
    assert output.shape == (2, 3, 0)
    assert torch.equal(state, torch.zeros(2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_are_kept_and_the_state_is_fp32(dtype: torch.dtype) -> None:
    tensors = inputs(2, 37, 3, 4, dtype)
    exact = {name: tensor.detach().double() for name, tensor in tensors.items()}
    output, state = ours(**tensors)
    assert (output.dtype, state.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(output.double(), loop(**exact)[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state.double(), loop(**exact)[1], rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(output.sum(), list(tensors.values()))
    assert [grad.dtype for grad in grads] == [dtype] * len(NAMES)


def test_autocast_does_not_lower_the_precision() -> None:
    tensors = inputs(2, 20, 3, 4, torch.float32)
    expected = ours(**tensors)
    expected_grads = gradients(expected, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(**tensors)
        found_grads = gradients(found, tensors)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(found_grads, expected_grads, rtol=0, atol=0)


@pytest.mark.parametrize("boundary", [1, CHUNK_STEPS, 19])
def test_a_packed_document_sees_nothing_of_the_one_before_it(boundary: int) -> None:
    tensors = inputs(2, 40, 3, 4)
    seq_idx = (torch.arange(40) >= boundary).long().expand(2, -1)
    second, _ = selective_scan(
        **tensors, delta_softplus=True, return_last_state=True, seq_idx=seq_idx
    )
    sequences = [name for name in NAMES if tensors[name].dim() == 3]
    alone = {name: tensors[name][..., boundary:] for name in sequences}
    torch.testing.assert_close(second[..., boundary:], ours(**tensors | alone)[0])
    grads = torch.autograd.grad(second[..., boundary:].sum(), [tensors[n] for n in sequences])
    assert all(not grad[..., :boundary].any() for grad in grads)


def test_saved_memory_holds_no_state_of_every_step() -> None:
    batch, length, channels, states = 2, 128, 8, 16
    tensors = inputs(batch, length, channels, states, torch.float32)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        selective_scan(**tensors, delta_softplus=True)
    inputs_bytes = sum(tensor.nbytes for tensor in tensors.values())
    states_bytes = batch * length * channels * states * 4
    saved_bytes = sum(tensor.nbytes for tensor in saved)
    assert saved_bytes == inputs_bytes + states_bytes // CHUNK_STEPS


# With transformers' models. The fixture leaves them as they were.


@pytest.fixture
def own_scan() -> Iterator[Any]:
    from transformers.models.mamba import modeling_mamba

    install("mamba", kernel="transformers")
    yield modeling_mamba.mamba_selective_scan
    for architecture in ("mamba", "falcon_mamba", "jamba", "zamba"):
        install(architecture, kernel="transformers")


def tiny_mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config)


def test_the_scan_equals_that_of_transformers(own_scan: Any) -> None:
    tensors = inputs(2, 33, 5, 4, torch.float32)
    expected = own_scan(**tensors, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(ours(**tensors), expected, rtol=1e-4, atol=1e-4)


def test_install_changes_neither_logits_nor_gradients_of_mamba(own_scan: Any) -> None:
    model, ids = tiny_mamba(), torch.arange(42).view(2, 21)

    def logits_and_gradients() -> list[Tensor]:
        logits_BLV = model(ids, use_cache=False).logits
        return [logits_BLV, *torch.autograd.grad(logits_BLV.square().sum(), model.parameters())]

    expected = logits_and_gradients()
    assert install("mamba").startswith("compiled scan")
    torch.testing.assert_close(logits_and_gradients(), expected, rtol=1e-4, atol=1e-5)


def test_greedy_generation_equals_that_of_transformers(own_scan: Any) -> None:
    model, ids = tiny_mamba().eval(), torch.arange(10).view(2, 5)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **arguments)
    install("mamba")
    assert torch.equal(model.generate(ids, **arguments), expected)


@pytest.mark.parametrize("architecture", ["mamba", "falcon_mamba", "jamba", "zamba"])
def test_install_serves_every_mamba_1_and_reference_puts_it_back(
    architecture: str, own_scan: Any
) -> None:
    assert install(architecture, kernel="transformers") == "transformers' own scan"
    modeling = sys.modules[f"transformers.models.{architecture}.modeling_{architecture}"]
    own = modeling.mamba_selective_scan
    assert install(architecture).startswith("compiled scan")
    assert modeling.mamba_selective_scan is selective_scan
    install(architecture, kernel="transformers")
    assert modeling.mamba_selective_scan is own


def test_install_leaves_mamba_ssm_in_place(own_scan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mamba import modeling_mamba

    monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
    assert install("mamba") == "mamba-ssm's CUDA scan"
    assert modeling_mamba.mamba_selective_scan is own_scan


@pytest.mark.parametrize("architecture", ["llama", "no_such_architecture"])
def test_install_passes_over_other_architectures(architecture: str) -> None:
    assert install(architecture) == ""
