"""The C of this folder, compiled by this machine's compiler and called on tensors of a CPU.

None of it is there without a compiler, and then all that it is for has a form in PyTorch, too.
"""

# B batch, L length, D channels

import ctypes
import hashlib
import os
import platform
import subprocess
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.compiler import build, compiler
from llmtrain.hardware import cpu_info
from llmtrain.kernel.walk import device_type

HERE = Path(__file__).parent
# No -ffast-math: what is not finite has to stay so, and be seen.
OPTIONS = [
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]
LANES = 16  # channels of a vector
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # that the C reads and writes

cache_root = Path(os.path.expanduser("~/.cache/llmtrain"))
is_on = True  # for state-space layers, unless their plan chose otherwise


def is_for(tensor: Tensor, name: str) -> bool:
    """Whether this is a tensor for the compiled functions of a source, and they are there."""
    if device_type(tensor) != "cpu" or not tensor.numel():
        return False
    return library(name, wide(tensor.dtype), cache_root) is not None


def scans(tensor: Tensor, name: str) -> bool:
    """Whether a state-space layer calls the compiled functions of a source."""
    return is_on and is_for(tensor, name)


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which the arithmetic on values of a dtype is."""
    return torch.promote_types(dtype, torch.float32)


@cache
def library(name: str, dtype: torch.dtype, folder: Path) -> ctypes.CDLL | None:
    """The compiled source for arithmetic in fp32 or fp64; None where it cannot be had."""
    source, real = HERE / f"{name}.c", "double" if dtype == torch.float64 else "float"
    options = [*OPTIONS, f"-DREAL={real}", f"-DREAL_IS_FLOAT={int(real == 'float')}"]
    # The flags are the instructions that it may use, which a cluster's nodes may not share.
    flags = [line for line in cpu_info().splitlines() if line.startswith(("flags", "Features"))]
    texts = [source.read_text(), (HERE / "vectors.h").read_text()]
    said = repr([texts, options, flags[:1], platform.libc_ver()])
    path = folder / "kernel" / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.so"
    try:
        if not path.exists() and compiler() is None:
            return None
        if not path.exists():
            build(source, path, options, ["-lm"])
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


class Strided(ctypes.Structure):
    """A tensor [B, D, L] of any strides; without one, no data."""

    _fields_ = [("data", c_void_p)] + [
        (name, c_int64) for name in ("batch", "channel", "time", "kind")
    ]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Strided":
        if tensor is None or not tensor.numel():
            return cls(None, 0, 0, 0, 0)
        return cls(tensor.data_ptr(), *tensor.stride(), KINDS[tensor.dtype])


def address(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def call(name: str, function: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call a function of a source that :func:`is_for` has found."""
    found = library(name, dtype, cache_root)
    assert found is not None, "is_for was not asked"
    code = getattr(found, function)(*arguments)
    if code == 2:
        raise IndexError("a label is no word of the vocabulary")
    if code:
        raise MemoryError(f"no memory for {function}")


def readable(tensor: Any, dtype: torch.dtype) -> Any:
    """In a dtype that the C knows."""
    return tensor if tensor is None or tensor.dtype in KINDS else tensor.to(dtype)


def dense(tensor: Any, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.to(dtype).contiguous()


def channels_last(x_BDL: Tensor) -> Tensor:
    """An empty one, with channels side by side, as the product that follows reads them."""
    batch, channels, length = x_BDL.shape
    return x_BDL.new_empty(batch, length, channels).transpose(1, 2)


def zeros_if(grad: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a result, which is None where nothing depends on it."""
    return torch.zeros_like(like, dtype=dtype) if grad is None else grad


def num_splits(batch: int, parts: int) -> int:
    """Into how many a sequence's parts are dealt, so that every thread has work."""
    wanted = -(-2 * torch.get_num_threads() // max(batch, 1))
    return max(1, min(wanted, parts))
