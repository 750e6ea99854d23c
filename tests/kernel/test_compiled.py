"""The C for Mamba-2's scan and the convolution before it, against definitions in float64."""

# B batch, L length, D channels, W taps, H heads, P channels of a head, G groups, N states

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from llmtrain.compiler import compiler
from llmtrain.kernel import compiled, compiled_heads
from llmtrain.kernel.compiled_convolution import convolution
from llmtrain.kernel.compiled_heads import CHUNK_STEPS

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler: cc, gcc or clang")
LIMITS = (0.0, float("inf"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def heads_inputs(
    batch: int, length: int, heads: int, width: int, groups: int, states: int
) -> list[Tensor]:
    """hidden_states, dt, A, B, C, D and dt_bias."""
    shapes = [(batch, length, heads, width), (batch, length, heads), (heads,)]
    shapes += [(batch, length, groups, states)] * 2 + [(heads,)] * 2
    found = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    found[2] = -found[2].exp()
    return [values.requires_grad_() for values in found]


def loop(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """The definition, a step at a time; the state is zero before each of ``starts``."""
    batch, length, heads, width = hidden_states.shape
    delta_BLH = softplus(dt + dt_bias)
    B, C = (part.repeat_interleave(heads // part.shape[2], 2) for part in (B, C))
    state = hidden_states.new_zeros(batch, heads, width, B.shape[3])
    outputs = []
    for t in range(length):
        if t in starts:
            state = torch.zeros_like(state)
        decay = (delta_BLH[:, t] * A).exp()[..., None, None]
        update = delta_BLH[:, t, :, None] * hidden_states[:, t]
        state = decay * state + update[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * hidden_states[:, t])
    return torch.stack(outputs, 1), state


def ours(*inputs: Tensor, starts: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    is_continued = None
    if starts:
        is_continued = torch.ones(inputs[1].shape[:2], dtype=torch.bool)
        is_continued[:, list(starts)] = False
    return compiled_heads.scan(*inputs, True, LIMITS, is_continued)


def gradients(results: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = [torch.linspace(-1, 1, part.numel()).view_as(part).to(part) for part in results]
    return torch.autograd.grad(results, inputs, weights)


SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 7, 4, 16, 2, 5),
    (1, CHUNK_STEPS, 3, 64, 1, 8),
    (2, CHUNK_STEPS + 9, 6, 20, 3, 4),
    (1, 2 * CHUNK_STEPS + 1, 2, 128, 1, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_output_state_and_every_gradient_equal_the_loop(shape: tuple[int, ...]) -> None:
    inputs = heads_inputs(*shape)
    expected, found = loop(*inputs), ours(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("start", [1, CHUNK_STEPS, CHUNK_STEPS + 3])
def test_the_state_starts_from_zero_where_a_document_does(start: int) -> None:
    inputs = heads_inputs(2, CHUNK_STEPS + 20, 4, 16, 2, 5)
    expected, found = loop(*inputs, starts=(start,)), ours(*inputs, starts=(start,))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs))


def test_gradcheck_of_the_scan_passes() -> None:
    assert torch.autograd.gradcheck(ours, heads_inputs(1, 11, 2, 3, 1, 2))


@pytest.mark.parametrize("shift", [-12.0, 0.0, 6.0])
def test_fp32_and_bf16_are_as_near_as_their_rounding(shift: float) -> None:
    exact = heads_inputs(2, 100, 4, 64, 1, 16)
    exact[1] = exact[1].detach() + shift
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        given = [exact[0].detach().to(dtype), *(part.detach().float() for part in exact[1:])]
        expected = loop(*(part.double() for part in given))
        for mine, theirs in zip(ours(*given), expected, strict=True):
            assert mine.dtype == torch.float32
            worst = float((mine - theirs).abs().max() / theirs.abs().max())
            assert worst < tolerance


def test_an_empty_sequence_is_not_for_the_compiled_scan() -> None:
    assert not compiled.is_for(torch.zeros(1, 0, 2, 4), "heads")


def convolved(
    x_BDL: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    is_silu: bool = True,
    position_BL: Tensor | None = None,
) -> Tensor:
    """The definition, a tap at a time."""
    taps, length = weight_DW.shape[1], x_BDL.shape[2]
    padded, sums = pad(x_BDL, (taps - 1, 0)), torch.zeros_like(x_BDL)
    for tap in range(taps):
        part = padded[:, :, tap : tap + length] * weight_DW[:, tap, None]
        if position_BL is not None:
            part = part * (position_BL >= taps - 1 - tap)[:, None]
        sums = sums + part
    sums = sums if bias_D is None else sums + bias_D[:, None]
    return silu(sums) if is_silu else sums


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 2, 4), (2, 17, 40, 4), (1, 48, 130, 3)])
@pytest.mark.parametrize("is_silu", [True, False])
def test_the_convolution_and_its_gradients_equal_the_definition(
    shape: tuple[int, ...], is_silu: bool
) -> None:
    batch, channels, length, taps = shape
    inputs = [normal(batch, channels, length), normal(channels, taps), normal(channels)]
    inputs = [values.requires_grad_() for values in inputs]
    x, weight, bias = inputs
    position_BL = (torch.arange(length) % 5).expand(batch, -1)
    for position in (None, position_BL):
        expected = convolved(x, weight, bias, is_silu, position)
        found = convolution(x, weight, bias, is_silu, position)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients((found,), inputs), gradients((expected,), inputs))


def test_gradcheck_of_the_convolution_passes_without_a_bias() -> None:
    inputs = [normal(2, 3, 6).requires_grad_(), normal(3, 4).requires_grad_()]

    def of(x_BDL: Tensor, weight_DW: Tensor) -> Tensor:
        return convolution(x_BDL, weight_DW, None, True, None)

    assert torch.autograd.gradcheck(of, inputs)


@pytest.mark.parametrize("is_transposed", [True, False])
def test_any_strides_and_bf16_are_read(is_transposed: bool) -> None:
    x_BDL: Any = normal(2, 33, 21).bfloat16()
    x_BDL = x_BDL.transpose(1, 2).contiguous().transpose(1, 2) if is_transposed else x_BDL
    weight, bias = normal(33, 4).bfloat16(), normal(33).bfloat16()
    found = convolution(x_BDL, weight, bias, True, None)
    assert found.dtype == torch.bfloat16
    expected = convolved(x_BDL.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_without_a_compiler_or_with_a_broken_one_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    false = tmp_path / "cc"
    false.write_text("#!/bin/sh\nexit 1\n")
    false.chmod(0o755)
    monkeypatch.setattr(compiled, "cache_root", tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compiled.is_for(torch.zeros(1, 2, 3), "scan")
    assert not list(tmp_path.glob("cache/**/*.so"))
