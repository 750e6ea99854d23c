"""The functions that transformers' state-space mixers call, as quick as this machine has them."""

# B batch, L length, D channels, W taps, H heads, P channels of a head, G groups, N states

import importlib
import importlib.util
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.kernel import compiled
from llmtrain.kernel.selective_scan import selective_scan

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., Any]

_TRANSFORMERS_OWN: dict[tuple[str, str], Function] = {}  # module and name -> what it came with


def install(architecture: str, kernel: str = "compiled", cache: Path | None = None) -> str:
    """Gives the state-space layers of a transformers ``model_type`` a plan's kernel.

    ``compiled`` is C on a CPU with a compiler, ``chunked`` Mamba-1's scan in PyTorch (and what
    stands in where C or mamba-ssm is not to be had); ``transformers`` is its own. Returns which one
    it is, as a phrase, or "" for an architecture without such layers. It holds for models built
    before, too.
    """
    if cache is not None:
        compiled.cache_root = cache
    module = modeling_module(architecture)
    found = [name for name in OURS if hasattr(module, name)]
    if len(found) < 2:  # a convolution alone is another kind of layer's
        return ""
    is_ours = kernel != "transformers" and not _has_mamba_ssm()
    compiled.is_on = kernel == "compiled"
    for name in found:
        own = _TRANSFORMERS_OWN.setdefault((module.__name__, name), own_of(module, name))
        # The mixer's forward looks this global up at each call. Transformers' supported door, a
        # kernel mapping, takes modules from the `kernels` package and is a no-op without it.
        setattr(module, name, OURS[name](own) if is_ours else own)
    if is_ours:
        found_kernel = "compiled" if compiled.is_on else "chunked"
        return f"{found_kernel} scan (mamba-ssm's compiled extension is not installed)"
    return "mamba-ssm's CUDA scan" if _has_mamba_ssm() else "transformers' own scan"


def own_of(module: Any, name: str) -> Function:
    """What is below a function that serves packed documents, too."""
    found = getattr(module, name)
    while hasattr(found, "serves_documents"):
        found = found.__wrapped__
    return found  # type: ignore[no-any-return]


def mamba_1(own: Function) -> Function:
    return selective_scan


def mamba_2(own: Function) -> Function:
    """Compiled where that is possible and no earlier state is given, else transformers' own."""

    @wraps(own)
    def scan(
        hidden_states: "Tensor",
        *inputs: Any,
        initial_states: "Tensor | None" = None,
        return_final_states: bool = False,
        **named: Any,
    ) -> Any:
        if initial_states is None and compiled.scans(hidden_states, "heads"):
            output_BLHP, last_BHPN = compiled_mamba_2(hidden_states, *inputs, **named)
            return (output_BLHP, last_BHPN) if return_final_states else output_BLHP
        more = {"initial_states": initial_states, "return_final_states": return_final_states}
        return own(hidden_states, *inputs, **named | more)

    return scan


def compiled_mamba_2(
    hidden_states: "Tensor",
    dt: "Tensor",
    A: "Tensor",
    B: "Tensor",
    C: "Tensor",
    chunk_size: int,
    D: "Tensor | None" = None,
    dt_bias: "Tensor | None" = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    seq_idx: "Tensor | None" = None,
    **unused: Any,
) -> "tuple[Tensor, Tensor]":
    """With the arguments of transformers' ``mamba2_chunk_scan``; chunks are of our own size."""
    from llmtrain.kernel import compiled_heads
    from llmtrain.kernel.selective_scan import is_continued

    given = (D, dt_bias, dt_softplus, dt_limit, is_continued(seq_idx))
    return compiled_heads.scan(hidden_states, dt, A, B, C, *given)


def convolution(own: Function) -> Function:
    """Compiled where that is possible, else transformers' own."""

    @wraps(own)
    def convolve(
        hidden_states: "Tensor",
        weight: "Tensor",
        bias: "Tensor | None" = None,
        activation: str | None = None,
        **unused: Any,
    ) -> "Tensor":
        if can_convolve(hidden_states, activation):
            return compiled_convolution(hidden_states, weight, bias, activation)
        return own(hidden_states, weight, bias, activation, **unused)  # type: ignore[no-any-return]

    return convolve


def can_convolve(x_BDL: "Tensor", activation: str | None) -> bool:
    return activation in (None, "silu", "swish") and compiled.scans(x_BDL, "convolution")


def compiled_convolution(
    x_BDL: "Tensor",
    weight_DW: "Tensor",
    bias_D: "Tensor | None",
    activation: str | None,
    position_BL: "Tensor | None" = None,
) -> "Tensor":
    from llmtrain.kernel.compiled_convolution import convolution

    return convolution(x_BDL, weight_DW, bias_D, activation is not None, position_BL)


# A global of transformers' modeling modules -> ours, given transformers' own.
OURS: dict[str, Callable[[Function], Function]] = {
    "causal_conv1d_fn": convolution,
    "mamba_selective_scan": mamba_1,
    "mamba2_chunk_scan": mamba_2,
}


def modeling_module(architecture: str) -> Any:
    """The transformers module of a ``model_type``; None where there is none."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    package = f"transformers.models.{model_type_to_module_name(architecture)}"
    name = f"{package}.modeling_{package.rsplit('.', 1)[-1]}"
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def _has_mamba_ssm() -> bool:
    """Whether mamba-ssm's compiled half loads: the package installs without it and then fails."""
    try:
        importlib.import_module("selective_scan_cuda")
    except ImportError:
        return False
    return True
