"""What a plan chooses where nothing was asked: each choice leaves its reason."""

import importlib.util

from llmtrain.compiler import compiler
from llmtrain.config import Precision, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine, cpu_prefers_bf16
from llmtrain.kernel.packed import MAMBA_2
from llmtrain.model.causal_lm import Attention, CausalLM, Kernels
from llmtrain.model.facts import Facts

MAMBA_EXTENSIONS = ("selective_scan_cuda", "causal_conv1d_cuda")
SHORT_SEQUENCE = 512  # up to here plain attention beats the fused one on a CPU
BLOCKS_SEQUENCE = 2048  # and up to here that by blocks, which keeps its probabilities

LARGE_MAMBA = 1e9  # parameters, from which a GPU without mamba-ssm would take weeks for days

Reasons = dict[str, str]


def choose_precision(config: RunConfig, machine: Machine, reasons: Reasons) -> str:
    """bf16 where the device multiplies it, else fp16 on a GPU and fp32 on a CPU."""
    asked = config.train.precision
    if asked is not None:
        if asked in (Precision.bf16, Precision.bf16_pure) and machine.device == "cuda":
            check_bf16(asked.value, machine)
        if asked is Precision.fp16 and machine.device == "cpu":
            reason = "has no kernels for training on a CPU"
            raise ConfigError("train.precision", asked.value, reason, "take bf16 or fp32")
        reasons["precision"] = "asked for"
        return asked.value
    if machine.has_bf16:
        reasons["precision"] = "the device multiplies bf16, which needs no loss scaling"
        return "bf16"
    reasons["precision"] = "the device has no bf16"
    return "fp16" if machine.device == "cuda" else "fp32"


def check_bf16(asked: str, machine: Machine) -> None:
    if not machine.has_bf16:
        reason = f"does not exist on {machine.device_name}"
        raise ConfigError("train.precision", asked, reason, "take fp16")


def warn_of_precision(model: CausalLM, machine: Machine, precision: str) -> list[str]:
    """A line for weights that are trained in the other 16-bit format than they were saved in."""
    saved = model.saved_dtype
    if saved == "bfloat16" and precision == "fp16":
        other = "bf16" if machine.has_bf16 else "fp32"
        return [
            f"train.precision=fp16 ends at 65504, and model={model.name} was saved in bf16, which "
            f"goes on to 3e38: should the loss become NaN, take train.precision={other}."
        ]
    if saved == "float16" and precision in ("bf16", "bf16_pure"):
        return [
            f"train.precision={precision} keeps 8 of the 11 bits in which model={model.name} was "
            "saved: it starts a little off what it was. train.precision=fp16 keeps them."
        ]
    return []


def choose_attention(
    config: RunConfig, machine: Machine, facts: Facts, precision: str, reasons: Reasons
) -> str:
    """The fastest attention that loads, in transformers' names."""
    asked = config.model.attention
    if not facts.num_attention_layers:
        reasons["attention"] = "the model has no attention"
        return "eager"
    if asked is not Attention.auto:
        if asked is Attention.flash:
            require_flash(machine)
            refuse_flash(flash_limit(config, precision, facts))
        if asked is Attention.sdpa and not facts.supports_sdpa:
            reason = f"does not exist for {facts.model_type}"
            raise ConfigError("model.attention", "sdpa", reason, "take eager")
        if asked is Attention.blocks and not facts.supports_blocks:
            reason = f"does not suit {facts.model_type}"
            raise ConfigError("model.attention", "blocks", reason, "take sdpa or eager")
        reasons["attention"] = "asked for"
        return {"flash": "flash_attention_2"}.get(asked.value, asked.value)
    can_block = facts.supports_blocks and config.model.kernels is not Kernels.reference
    if machine.device == "cpu" and can_block and config.train.seq_len <= BLOCKS_SEQUENCE:
        reasons["attention"] = f"fastest on a CPU up to {BLOCKS_SEQUENCE} tokens"
        return "blocks"
    if machine.device == "cpu" and config.train.seq_len <= SHORT_SEQUENCE:
        reasons["attention"] = f"plain products are fastest on a CPU up to {SHORT_SEQUENCE} tokens"
        return "eager"
    problem = flash_problem(machine) or flash_limit(config, precision, facts)
    if problem is None:
        reasons["attention"] = "flash-attn is installed"
        return "flash_attention_2"
    if not facts.supports_sdpa:
        reasons["attention"] = f"{facts.model_type} has no other"
        return "eager"
    reasons["attention"] = f"torch's fused attention ({problem})"
    return "sdpa"


def flash_limit(config: RunConfig, precision: str, facts: Facts) -> str | None:
    """What of this run flash-attn cannot do; None where it can do all."""
    if precision == "fp32":
        return "flash-attn has no fp32"
    if config.data.keeps_apart:
        return "flash-attn keeps documents apart in batches of one only"
    return None if facts.supports_flash else "flash-attn does not suit the model's heads or class"


def require_flash(machine: Machine) -> None:
    problem = flash_problem(machine)
    if problem:
        raise ConfigError("model.attention", "flash", f"cannot load: {problem}", "take sdpa")


def refuse_flash(problem: str | None) -> None:
    if problem:
        remedy = "take sdpa, or data.packing=false for rows"
        raise ConfigError("model.attention", "flash", f"does not work here: {problem}", remedy)


def flash_problem(machine: Machine) -> str | None:
    """Why flash-attn cannot be used; None where it can."""
    if machine.device != "cuda":
        return "flash-attn is for GPUs"
    if not machine.has_bf16:
        return "flash-attn needs an Ampere GPU or newer"
    if importlib.util.find_spec("flash_attn_2_cuda") is None:
        return "flash-attn's compiled extension is not installed"
    return None


def choose_products(config: RunConfig, machine: Machine, precision: str, reasons: Reasons) -> bool:
    """Whether products of bf16 are made in fp32, on a CPU that is faster so."""
    is_asked = config.model.kernels is Kernels.auto and precision != "fp32"
    is_wide = machine.device == "cpu" and is_asked and not cpu_prefers_bf16()
    if is_wide:
        reasons["has_wide_products"] = "this CPU multiplies fp32 faster than bf16"
    return is_wide


def choose_scan(model: CausalLM, machine: Machine, facts: Facts, reasons: Reasons) -> str | None:
    """Which state-space scan the model's layers will use; None for a model without any."""
    is_mamba1 = facts.model_type in ("mamba", "falcon_mamba", "jamba", "zamba")
    has_scan = is_mamba1 or facts.num_attention_layers < facts.num_layers
    if not has_scan:
        return None
    if model.kernels is not Kernels.auto:
        reasons["scan_kernel"] = "asked for"
        return "chunked" if model.kernels is Kernels.chunked and is_mamba1 else "transformers"
    if machine.device == "cuda" and is_mamba1 and not machine.is_here:
        reasons["scan_kernel"] = "to be installed there: pip install mamba-ssm causal-conv1d"
        return "mamba-ssm"
    if machine.device == "cuda" and all(map(importlib.util.find_spec, MAMBA_EXTENSIONS)):
        reasons["scan_kernel"] = "mamba-ssm's compiled extension is installed"
        return "mamba-ssm"
    is_known = is_mamba1 or facts.model_type in (*MAMBA_2, "granitemoehybrid")
    if machine.device == "cpu" and is_known and compiler() is not None:
        reasons["scan_kernel"] = "C, by the compiler of this machine"
        return "compiled"
    missing = "mamba-ssm's compiled extension is not installed"
    if is_mamba1:
        if machine.device == "cuda" and facts.num_parameters >= LARGE_MAMBA:
            remedy = "run make install-cuda, or take model.kernels=chunked to wait all the same"
            reason = f"would train a hundred times slower: {missing}"
            raise ConfigError("model", model.name, reason, remedy)
        reasons["scan_kernel"] = missing if machine.device == "cuda" else "there is no C compiler"
        return "chunked"
    reasons["scan_kernel"] = f"transformers' chunked matrix form ({missing})"
    return "transformers"
