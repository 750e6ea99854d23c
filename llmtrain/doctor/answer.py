"""The process that answers one question about torch or a package: JSON in its last line.

`python -m llmtrain.doctor.answer QUESTION [WORD ...]`
"""

import importlib
import json
import os
import sys
from contextlib import suppress
from typing import Any

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}


def torch_facts(device: str) -> dict[str, Any]:
    """Versions of torch and its libraries, whether it reaches the GPUs, and what it multiplies."""
    import torch

    has_cuda = torch.version.cuda is not None
    problem = cuda_problem() if device == "cuda" else None
    reached = device if problem is None else "cpu"
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": list(torch.cuda.nccl.version()) if has_cuda and device == "cuda" else None,
        "archs": torch.cuda.get_arch_list(),
        "num_gpus": torch.cuda.device_count() if reached == "cuda" else 0,
        "problem": problem,
        "dtypes": [name for name in DTYPES if multiplies(reached, name)],
    }


def cuda_problem() -> str | None:
    """Why torch does not reach a GPU; None where it does."""
    import torch

    try:
        torch.cuda.init()
        torch.ones(1, device="cuda").item()
    except Exception as error:  # torch raises AssertionError, RuntimeError and its own
        return str(error).strip().splitlines()[0]
    return None


def multiplies(device: str, name: str) -> bool:
    """Whether a small product in a dtype comes out right on a device."""
    import torch

    ones = torch.ones(32, 32, device=device).to(getattr(torch, DTYPES[name]))
    with suppress(Exception):  # a dtype that is missing says so in many ways
        product = product_in_fp8(ones) if name == "fp8" else ones @ ones
        return bool((product.float() == 32).all())
    return False


def product_in_fp8(ones: Any) -> Any:
    import torch

    scale = torch.ones((), device=ones.device)
    return torch._scaled_mm(ones, ones.t(), scale, scale, out_dtype=torch.bfloat16)


def load(module: str) -> str:
    """Import a compiled extension as its package does, after torch's libraries."""
    import torch  # noqa: F401

    importlib.import_module(module)
    return "loads"


def quantize(device: str) -> float:
    """The largest error of bitsandbytes' 4 bits on numbers of up to 1."""
    import torch
    from bitsandbytes import functional

    numbers = torch.linspace(-1, 1, 4096, device=device)
    packed, scales = functional.quantize_4bit(numbers, quant_type="nf4")
    restored = functional.dequantize_4bit(packed, scales)
    return float((restored - numbers).abs().max())


def ops(device: str) -> dict[str, Any]:
    """Which of the operators that llmtrain can ask of DeepSpeed may be compiled here."""
    os.environ["DS_ACCELERATOR"] = device
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, CPULionBuilder
    from torch.utils import cpp_extension

    builders = {"Adam": CPUAdamBuilder, "Lion": CPULionBuilder, "NVMe": AsyncIOBuilder}
    compatible = {name: one().is_compatible(verbose=False) for name, one in builders.items()}
    return {**compatible, "cuda_home": cpp_extension.CUDA_HOME}


QUESTIONS = {"torch": torch_facts, "load": load, "quantize": quantize, "ops": ops}

if __name__ == "__main__":
    answer = QUESTIONS[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps(answer))
