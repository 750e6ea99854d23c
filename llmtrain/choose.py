"""What a plan chooses where nothing was asked: each choice leaves its reason."""

import importlib.util
from typing import Any

from llmtrain.config import Precision, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine
from llmtrain.memory import MARGIN, Layout, Memory, estimate
from llmtrain.model.causal_lm import Attention, CausalLM, Facts

MOST_MICRO_TOKENS = {"cpu": 2048, "cuda": 32768}  # beyond, a larger micro-batch is no faster
MOST_BF16_ACCUMULATION = 8  # micro-batches that bf16 gradients may add up without losing the last
SHORT_SEQUENCE = 512  # up to here plain attention beats the fused one on a CPU

Reasons = dict[str, str]


def check_stage(config: RunConfig, machine: Machine) -> None:
    """What the optimizer and the device allow of what was asked of ZeRO."""
    config.optimizer.check(machine.device, config.train.grad_clip)
    stage, optimizer = config.zero.stage, config.optimizer
    if stage is not None and stage not in optimizer.stages:
        remedy = f"it works at stages {', '.join(map(str, optimizer.stages))}"
        raise ConfigError(
            "zero.stage", stage, f"does not work with optimizer={optimizer.kind}", remedy
        )
    for name in ("offload_optimizer", "offload_params"):
        asked = getattr(config.zero, name)
        if asked is None or asked.value == "none":
            continue
        if not optimizer.offloads:
            reason = f"is not possible with optimizer={optimizer.kind}"
            raise ConfigError(f"zero.{name}", asked.value, reason, "take optimizer=adamw")
        if asked.value == "nvme" and config.zero.nvme_path is None:
            raise ConfigError(f"zero.{name}", "nvme", "needs a folder", "give zero.nvme_path")
        needed = 3 if name == "offload_params" else 1
        if stage is not None and stage < needed:
            raise ConfigError(
                "zero.stage", stage, f"cannot offload so ({name})", f"take {needed} or more"
            )


def check_length(config: RunConfig, facts: Facts) -> None:
    if (
        facts.num_attention_layers
        and facts.max_seq_len
        and config.train.seq_len > facts.max_seq_len
    ):
        reason = f"is longer than the model's {facts.max_seq_len} positions"
        remedy = "shorten it or raise model.config.max_position_embeddings"
        raise ConfigError("train.seq_len", config.train.seq_len, reason, remedy)


def check_documents(config: RunConfig, facts: Facts) -> None:
    """Only attention can be kept within a document; a state-space layer's state runs on."""
    if config.data.keep_documents_apart and facts.num_attention_layers < facts.num_layers:
        reason = f"is not possible: {facts.model_type} keeps a state that runs on across documents"
        raise ConfigError("data.keep_documents_apart", "true", reason, "set it to false")


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


def choose_attention(config: RunConfig, machine: Machine, facts: Facts, reasons: Reasons) -> str:
    """The fastest attention that loads, in transformers' names."""
    asked = config.model.attention
    if not facts.num_attention_layers:
        reasons["attention"] = "the model has no attention"
        return "eager"
    if asked is not Attention.auto:
        if asked is Attention.flash:
            require_flash(machine)
        reasons["attention"] = "asked for"
        return {"flash": "flash_attention_2"}.get(asked.value, asked.value)
    if machine.device == "cpu" and config.train.seq_len <= SHORT_SEQUENCE:
        reasons["attention"] = f"plain products are fastest on a CPU up to {SHORT_SEQUENCE} tokens"
        return "eager"
    if machine.device == "cuda" and flash_problem(machine) is None:
        reasons["attention"] = "flash-attn is installed"
        return "flash_attention_2"
    why = flash_problem(machine) or "flash-attn is for GPUs"
    reasons["attention"] = f"torch's fused attention ({why})"
    return "sdpa"


def require_flash(machine: Machine) -> None:
    problem = flash_problem(machine)
    if problem:
        raise ConfigError("model.attention", "flash", f"cannot load: {problem}", "take sdpa")


def flash_problem(machine: Machine) -> str | None:
    """Why flash-attn cannot be used; None where it can."""
    if machine.device != "cuda":
        return "flash-attn is for GPUs"
    if not machine.has_bf16:
        return "flash-attn needs an Ampere GPU or newer"
    if importlib.util.find_spec("flash_attn_2_cuda") is None:
        return "flash-attn's compiled extension is not installed"
    return None


def choose_scan(model: CausalLM, machine: Machine, facts: Facts, reasons: Reasons) -> str | None:
    """Which state-space scan the model's layers will use; None for a model without any."""
    is_mamba1 = facts.model_type in ("mamba", "falcon_mamba", "jamba", "zamba")
    has_scan = is_mamba1 or facts.num_attention_layers < facts.num_layers
    if not has_scan:
        return None
    compiled = (
        importlib.util.find_spec("selective_scan_cuda") is not None and machine.device == "cuda"
    )
    if compiled:
        reasons["scan_kernel"] = "mamba-ssm's compiled extension is installed"
        return "mamba-ssm"
    missing = "mamba-ssm's compiled extension is not installed"
    if model.kernels.value == "reference":
        reasons["scan_kernel"] = "asked for"
        return "transformers"
    if is_mamba1:
        reasons["scan_kernel"] = missing if machine.device == "cuda" else "mamba-ssm is for GPUs"
        return "chunked"
    reasons["scan_kernel"] = f"transformers' chunked matrix form ({missing})"
    return "transformers"


def choose_layout(
    config: RunConfig,
    machine: Machine,
    facts: Facts,
    precision: str,
    attention: str,
    reasons: Reasons,
) -> Layout:
    """ZeRO stage, offload, recomputation and micro-batch: the least that fits.

    What is asked for is taken as it is; of what is left, candidates are tried from the fastest to
    the most frugal.
    """
    micro_batches = possible_micro_batches(config, machine)
    candidates = [
        Layout(
            precision=precision,
            zero_stage=stage,
            offload_optimizer=optimizer,
            offload_params=params,
            activation_checkpointing=recompute,
            attention=attention,
            world_size=machine.world_size,
            micro_batch=micro_batch,
            seq_len=config.train.seq_len,
        )
        for stage, optimizer, params in possible_zero(config, machine, reasons)
        for recompute in possible_recomputation(config)
        for micro_batch in micro_batches
    ]
    state_bytes = config.optimizer.state_bytes
    for layout in candidates:
        if loses_gradients(config, layout):
            continue
        if fits(estimate(facts, layout, state_bytes), machine):
            explain_layout(config, layout, micro_batches, reasons)
            return layout
    reasons["zero_stage"] = "the most frugal of all"
    return candidates[-1]


def loses_gradients(config: RunConfig, layout: Layout) -> bool:
    """Whether a stage that nobody asked for would add up many micro-batches in bf16."""
    grad_accum = config.train.global_batch // (layout.world_size * layout.micro_batch)
    is_bf16 = layout.precision.startswith("bf16") and not accumulates_in_fp32(
        layout, config.optimizer.whole_gradients
    )
    return config.zero.stage is None and is_bf16 and grad_accum > MOST_BF16_ACCUMULATION


def accumulates_in_fp32(layout: Layout, whole_gradients: bool) -> bool:
    """DeepSpeed adds bf16 gradients up in fp32 from stage 2 on.

    At stage 1 it does so in an optimizer that knows flat gradients only, and never at stage 0.
    """
    least = 2 if whole_gradients else 1
    return layout.precision == "bf16" and layout.zero_stage >= least


def possible_micro_batches(config: RunConfig, machine: Machine) -> list[int]:
    """Micro-batches that divide a rank's share of the global batch, largest first.

    Raises ConfigError where the arithmetic cannot come out.
    """
    batch, world = config.train.global_batch, machine.world_size
    asked = config.train.micro_batch
    unit = world * (asked or 1)
    if batch % unit:
        below, above = batch // unit * unit, -(-batch // unit) * unit
        reason = f"is not a multiple of {world} ranks x micro_batch {asked or 1} = {unit}"
        nearest = f"nearest are {below} and {above}" if below else f"nearest is {above}"
        raise ConfigError("train.global_batch", batch, reason, nearest)
    if asked is not None:
        return [asked]
    share = batch // world
    most = max(1, MOST_MICRO_TOKENS[machine.device] // config.train.seq_len)
    return [size for size in range(share, 0, -1) if share % size == 0 and size <= most]


def possible_zero(
    config: RunConfig, machine: Machine, reasons: Reasons
) -> list[tuple[int, str, str]]:
    """(stage, where the optimizer is, where the weights are), from fast to frugal."""
    choices = [
        (0, "none", "none"),
        (1, "none", "none"),
        (2, "none", "none"),
        (3, "none", "none"),
        (2, "cpu", "none"),
        (3, "cpu", "none"),
        (3, "cpu", "cpu"),
    ]
    zero, optimizer = config.zero, config.optimizer
    wanted = [
        zero.stage,
        *(getattr(zero, name) for name in ("offload_optimizer", "offload_params")),
    ]
    asked = [getattr(value, "value", value) for value in wanted]
    if asked != [None, None, None]:
        reasons["zero_stage"] = "asked for"
        exact = (
            asked[0] if asked[0] is not None else smallest_stage(asked),
            asked[1] or "none",
            asked[2] or "none",
        )
        if None not in asked or exact not in choices:
            return [exact]
        choices = [exact, *(c for c in choices if matches(c, asked))]
    if machine.world_size == 1:  # nothing to partition: stage 3 serves offloading alone
        choices = [c for c in choices if c[0] < 3 or c[1] != "none"] or choices
    if machine.device == "cpu":
        choices = [c for c in choices if c[1] == "none"] or choices
    kept = [
        c for c in choices if c[0] in optimizer.stages and (optimizer.offloads or c[1] == "none")
    ]
    return kept or choices[:1]


def smallest_stage(asked: list[Any]) -> int:
    """The smallest ZeRO stage that can offload what was asked."""
    if asked[2] not in (None, "none"):
        return 3
    return 1 if asked[1] not in (None, "none") else 0


def matches(choice: tuple[int, str, str], asked: list[Any]) -> bool:
    return all(want is None or have == want for have, want in zip(choice, asked, strict=True))


def possible_recomputation(config: RunConfig) -> list[str]:
    asked = config.train.activation_checkpointing
    return [asked] if asked is not None else ["none", "full"]


def explain_layout(
    config: RunConfig, layout: Layout, micro_batches: list[int], reasons: Reasons
) -> None:
    """Why this layout was taken."""
    if "zero_stage" not in reasons:
        offloaded = layout.offload_optimizer != "none"
        smaller = "the optimizer goes to the host: its state does not fit the device"
        least = "the smallest stage whose state fits the device"
        exact = "many micro-batches are added up in fp32"
        alone = exact if layout.zero_stage else "one rank has nothing to partition"
        reasons["zero_stage"] = smaller if offloaded else alone if layout.world_size == 1 else least
    if config.train.micro_batch is not None:
        reasons["micro_batch"] = "asked for"
    elif layout.micro_batch == micro_batches[0]:
        reasons["micro_batch"] = "a larger one would be no faster or does not divide the batch"
    else:
        reasons["micro_batch"] = "the largest that fits"
    recompute = config.train.activation_checkpointing
    if recompute is not None:
        reasons["activation_checkpointing"] = "asked for"
    elif layout.activation_checkpointing == "none":
        reasons["activation_checkpointing"] = "activations fit"
    else:
        reasons["activation_checkpointing"] = "activations do not fit without"


def fits(memory: Memory, machine: Machine) -> bool:
    """Whether a layout's peak leaves the margin on the device and on the host."""
    host = memory.host_peak_gib * machine.gpus_per_node
    if machine.device == "cpu":
        return memory.device_peak_gib <= MARGIN * machine.memory_gib
    on_device = memory.device_peak_gib <= MARGIN * machine.memory_gib
    return on_device and host <= MARGIN * machine.host_memory_gib
