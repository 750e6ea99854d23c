"""Every number that is derived from a config, in one frozen object; and the plan command."""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config import Format, Precision, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine, resolve
from llmtrain.memory import MARGIN, Layout, Memory, estimate
from llmtrain.model.causal_lm import Attention, CausalLM, Facts
from llmtrain.schema import check_bounds
from llmtrain.throughput import flops_per_token

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest

MOST_EPOCHS = 4  # more passes over the same text teach little (Muennighoff et al. 2023)
MOST_MICRO_TOKENS = {"cpu": 2048, "cuda": 32768}  # beyond, a larger micro-batch is no faster
SHORT_SEQUENCE = 512  # up to here plain attention beats the fused one on a CPU


@dataclass(frozen=True)
class Data:
    """What the plan knows of the corpus; ``is_estimate`` until it has been prepared."""

    name: str
    num_train_tokens: int
    num_held_out_tokens: int
    is_estimate: bool
    fingerprint: str | None


@dataclass(frozen=True)
class Plan:
    """What will happen, decided. Sizes in GiB, rates in FLOP/s with their prefix, times in seconds.

    ``peak_tflops`` is one device's and null where it is not known or, on a CPU, measured at the
    start. ``step_seconds`` and ``total_hours`` are null: they are not predicted yet.
    """

    name: str
    device: str
    device_name: str
    gpus_per_node: int
    num_nodes: int
    world_size: int
    threads_per_rank: int
    model: str
    num_parameters: int
    num_active_parameters: int
    flops_per_token: float
    vocab_size: int
    attention: str
    scan_kernel: str | None
    precision: str
    zero_stage: int
    offload_optimizer: str
    offload_params: str
    nvme_path: str | None
    activation_checkpointing: str
    seq_len: int
    global_batch: int
    micro_batch: int
    grad_accum: int
    tokens_per_step: int
    num_steps: int
    num_tokens: int
    num_epochs: float
    warmup_steps: int
    learning_rate: float
    grad_clip: float
    log_every: int
    eval_every: int
    eval_sequences: int
    final_eval_sequences: int
    checkpoint_every: int
    data: Data
    peak_tflops: float | None
    memory: dict[str, Any]
    fits: bool
    step_seconds: float | None
    total_hours: float | None
    warnings: tuple[str, ...]
    reasons: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        values = values | {"data": Data(**values["data"]), "warnings": tuple(values["warnings"])}
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        return cls.from_json(json.loads(path.read_text()))


def check(config: RunConfig) -> None:
    """Raise ConfigError for what can be seen to be wrong without importing torch."""
    check_bounds(config)
    for part in ("model", "optimizer", "schedule", "data", "mode"):
        check_bounds(getattr(config, part), f"{part}.")
    asked = [name for name in ("max_steps", "max_tokens", "max_epochs") if getattr(config.train, name)]
    if len(asked) > 1:
        key, other = (f"train.{name}" for name in asked[:2])
        value = getattr(config.train, asked[0])
        raise ConfigError(key, value, f"and {other} are both given", "give one of them")
    check_name(config)
    check_recomputation(config)
    config.model.check()
    config.data.check()


def check_name(config: RunConfig) -> None:
    """A name becomes a folder's."""
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise ConfigError("name", config.name, "cannot name a folder", "leave out / and a leading dot")
    if not (config.resume in ("auto", "never") or config.resume.isdigit() or Path(config.resume).exists()):
        raise ConfigError("resume", config.resume, "is no checkpoint", "give auto, never or a step")


def check_recomputation(config: RunConfig) -> None:
    value = config.train.activation_checkpointing
    if value is not None and value not in ("none", "full") and not (value.isdigit() and int(value) > 0):
        remedy = "give none, full, or k to recompute every k-th layer"
        raise ConfigError("train.activation_checkpointing", value, "is not understood", remedy)


def make_plan(config: RunConfig, manifest: "Manifest | None" = None) -> Plan:
    """Derive everything. Without a manifest the corpus's size is an estimate, and marked as one.

    Raises ConfigError for anything that cannot work or does not fit.
    """
    check(config)
    machine = resolve(config.hardware)
    check_stage(config, machine)
    facts = config.model.facts(config.cache)
    check_length(config, facts)
    data = describe_data(config, manifest)
    check_vocabulary(facts, manifest)
    reasons: dict[str, str] = {}
    precision = choose_precision(config, machine, reasons)
    attention = choose_attention(config, machine, facts, reasons)
    layout = choose_layout(config, machine, facts, precision, attention, reasons)
    memory = estimate(facts, layout, config.optimizer.state_bytes)
    num_steps = count_steps(config, data, reasons)
    tokens_per_step = config.train.global_batch * config.train.seq_len
    eval_every = config.train.eval_every or max(1, -(-num_steps // 5))
    checkpoint_every = config.checkpoint.every or max(1, min(500, -(-num_steps // 5)))
    eval_sequences, final_eval_sequences = count_eval_sequences(config, data, num_steps, eval_every)
    warmup_steps = config.schedule.warmup_steps
    if warmup_steps is None:
        warmup_steps = num_steps // 20
        reasons["warmup_steps"] = "5 % of the steps"
    flops = flops_per_token(facts, config.train.seq_len)
    num_tokens = num_steps * tokens_per_step
    plan = Plan(
        name=f"{config.name}-{config.identity}",
        device=machine.device,
        device_name=machine.device_name,
        gpus_per_node=machine.gpus_per_node,
        num_nodes=machine.num_nodes,
        world_size=machine.world_size,
        threads_per_rank=max(1, machine.num_cores // machine.gpus_per_node),
        model=config.model.name,
        num_parameters=facts.num_parameters,
        num_active_parameters=facts.num_active_parameters,
        flops_per_token=flops,
        vocab_size=facts.vocab_size,
        attention=attention,
        scan_kernel=choose_scan(config.model, machine, facts, reasons),
        precision=precision,
        zero_stage=layout.zero_stage,
        offload_optimizer=layout.offload_optimizer,
        offload_params=layout.offload_params,
        nvme_path=config.zero.nvme_path,
        activation_checkpointing=layout.activation_checkpointing,
        seq_len=config.train.seq_len,
        global_batch=config.train.global_batch,
        micro_batch=layout.micro_batch,
        grad_accum=config.train.global_batch // (machine.world_size * layout.micro_batch),
        tokens_per_step=tokens_per_step,
        num_steps=num_steps,
        num_tokens=num_tokens,
        num_epochs=num_tokens / max(1, data.num_train_tokens),
        warmup_steps=min(warmup_steps, num_steps),
        learning_rate=config.optimizer.lr,
        grad_clip=config.train.grad_clip,
        log_every=config.train.log_every,
        eval_every=eval_every,
        eval_sequences=eval_sequences,
        final_eval_sequences=final_eval_sequences,
        checkpoint_every=checkpoint_every,
        data=data,
        peak_tflops=machine.peak_tflops.get(precision.removesuffix("_pure")),
        memory=memory_json(memory),
        fits=fits(memory, machine),
        step_seconds=None,
        total_hours=None,
        warnings=(),
        reasons=reasons,
    )
    if not plan.fits:
        raise does_not_fit(plan, memory, machine)
    return replace(plan, warnings=tuple(warn(config, plan)))


def describe_data(config: RunConfig, manifest: "Manifest | None") -> Data:
    """The corpus's size: exact from its manifest, else an estimate."""
    if manifest is not None:
        counts = (manifest.train.num_tokens, manifest.held_out.num_tokens)
        return Data(config.data.name, *counts, is_estimate=False, fingerprint=manifest.train.sha)
    tokens = config.data.estimate_tokens()
    held_out = tokens // config.data.held_out_every
    return Data(config.data.name, tokens, held_out, is_estimate=True, fingerprint=None)


def check_stage(config: RunConfig, machine: Machine) -> None:
    """What the optimizer and the device allow of what was asked of ZeRO."""
    config.optimizer.check(machine.device)
    stage, optimizer = config.zero.stage, config.optimizer
    if stage is not None and stage not in optimizer.stages:
        remedy = f"it works at stages {', '.join(map(str, optimizer.stages))}"
        raise ConfigError("zero.stage", stage, f"does not work with optimizer={optimizer.kind}", remedy)
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
            raise ConfigError("zero.stage", stage, f"cannot offload so ({name})", f"take {needed} or more")


def check_length(config: RunConfig, facts: Facts) -> None:
    if facts.num_attention_layers and facts.max_seq_len and config.train.seq_len > facts.max_seq_len:
        reason = f"is longer than the model's {facts.max_seq_len} positions"
        remedy = "shorten it or raise model.config.max_position_embeddings"
        raise ConfigError("train.seq_len", config.train.seq_len, reason, remedy)


def check_vocabulary(facts: Facts, manifest: "Manifest | None") -> None:
    if manifest is not None and manifest.vocabulary.size > facts.vocab_size:
        size = manifest.vocabulary.size
        reason = f"is smaller than the tokenizer's {size} entries"
        remedy = f"set it to {-(-size // 64) * 64} or take a smaller tokenizer"
        raise ConfigError("model.config.vocab_size", facts.vocab_size, reason, remedy)


def choose_precision(config: RunConfig, machine: Machine, reasons: dict[str, str]) -> str:
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


def choose_attention(
    config: RunConfig, machine: Machine, facts: Facts, reasons: dict[str, str]
) -> str:
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
    import importlib.util

    if machine.device != "cuda":
        return "flash-attn is for GPUs"
    if not machine.has_bf16:
        return "flash-attn needs an Ampere GPU or newer"
    if importlib.util.find_spec("flash_attn_2_cuda") is None:
        return "flash-attn's compiled extension is not installed"
    return None


def choose_scan(
    model: CausalLM, machine: Machine, facts: Facts, reasons: dict[str, str]
) -> str | None:
    """Which state-space scan the model's layers will use; None for a model without any."""
    import importlib.util

    is_mamba1 = facts.model_type in ("mamba", "falcon_mamba", "jamba", "zamba")
    has_scan = is_mamba1 or facts.num_attention_layers < facts.num_layers
    if not has_scan:
        return None
    compiled = importlib.util.find_spec("selective_scan_cuda") is not None and machine.device == "cuda"
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
    reasons: dict[str, str],
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
        if fits(estimate(facts, layout, state_bytes), machine):
            explain_layout(config, layout, micro_batches, reasons)
            return layout
    reasons["zero_stage"] = "the most frugal of all"
    return candidates[-1]


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
    config: RunConfig, machine: Machine, reasons: dict[str, str]
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
    wanted = [zero.stage, *(getattr(zero, name) for name in ("offload_optimizer", "offload_params"))]
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
    if machine.world_size == 1:  # nothing to partition: stages 1 to 3 only serve offloading
        choices = [c for c in choices if c[0] == 0 or c[1] != "none"] or choices
    if machine.device == "cpu":
        choices = [c for c in choices if c[1] == "none"] or choices
    kept = [c for c in choices if c[0] in optimizer.stages and (optimizer.offloads or c[1] == "none")]
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
    config: RunConfig, layout: Layout, micro_batches: list[int], reasons: dict[str, str]
) -> None:
    """Why this layout was taken."""
    if "zero_stage" not in reasons:
        offloaded = layout.offload_optimizer != "none"
        smaller = "the optimizer goes to the host: its state does not fit the device"
        least = "the smallest stage whose state fits the device"
        alone = "one rank has nothing to partition"
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
    host = memory.host_peak_gib * machine.gpus_per_node / (1 if machine.num_nodes else 1)
    if machine.device == "cpu":
        return memory.device_peak_gib <= MARGIN * machine.memory_gib
    on_device = memory.device_peak_gib <= MARGIN * machine.memory_gib
    return on_device and host <= MARGIN * machine.host_memory_gib


def does_not_fit(plan: Plan, memory: Memory, machine: Machine) -> ConfigError:
    reason = (
        f"needs about {memory.device_peak_gib:.1f} GiB on each device, which has "
        f"{machine.memory_gib:.1f}, and {memory.host_peak_gib * machine.gpus_per_node:.1f} GiB on the "
        f"host, which has {machine.host_memory_gib:.1f}"
    )
    remedy = "take a smaller model, a shorter train.seq_len or more devices"
    return ConfigError("model", plan.model, reason, remedy)


def memory_json(memory: Memory) -> dict[str, Any]:
    host = {f"host {name}": value for name, value in memory.host.items()}
    return {
        "device_peak_gib": memory.device_peak_gib,
        "host_peak_gib": memory.host_peak_gib,
        "components": memory.device | host,
    }


def count_steps(config: RunConfig, data: Data, reasons: dict[str, str]) -> int:
    """The horizon in steps, from whichever of steps, tokens or epochs was given."""
    train, recipe = config.train, config.mode.recipe
    per_step = train.global_batch * train.seq_len
    if train.max_steps:
        reasons["num_steps"] = "train.max_steps"
        return train.max_steps
    if train.max_tokens or train.max_epochs:
        reasons["num_steps"] = "train.max_tokens" if train.max_tokens else "train.max_epochs"
        tokens = train.max_tokens or train.max_epochs * data.num_train_tokens
    elif recipe.max_tokens or recipe.max_epochs:
        reasons["num_steps"] = f"the horizon of {config.model.name}'s recipe"
        tokens = recipe.max_tokens or recipe.max_epochs * data.num_train_tokens
    else:
        reasons["num_steps"] = "one pass over the data"
        tokens = data.num_train_tokens
    return max(1, math.ceil(tokens / per_step))


def count_eval_sequences(
    config: RunConfig, data: Data, num_steps: int, eval_every: int
) -> tuple[int, int]:
    """Held-out sequences of an evaluation on the way, and of the closing one.

    On the way, evaluating costs about 2 % of training (a forward pass is a third of a step); at the
    end everything is read, unless that were more than a fifth of what was trained on.
    """
    batch = config.train.global_batch
    everything = max(1, -(-(data.num_held_out_tokens - 1) // config.train.seq_len))
    if config.train.eval_batches is not None:
        asked = min(everything, config.train.eval_batches * batch)
        return asked, everything if num_steps * batch >= 5 * everything else asked
    on_the_way = min(everything, max(batch, eval_every * batch // 16))
    closing = min(everything, max(on_the_way, num_steps * batch // 5))
    return on_the_way, closing


def warn(config: RunConfig, plan: Plan) -> list[str]:
    """What is allowed and probably not meant."""
    found = []
    if plan.num_epochs > MOST_EPOCHS:
        found.append(
            f"{plan.num_tokens:.3g} tokens are {plan.num_epochs:.0f} passes over the "
            f"{plan.data.num_train_tokens:.3g} tokens of data={plan.data.name}: past {MOST_EPOCHS} "
            "passes little is learned. Take more data (FineWeb-Edu, say: data=text "
            "data.path=<its parquet files>) or a shorter horizon."
        )
    if config.data.keep_documents_apart is False:
        pass
    return found


def show_plan(plan: Plan) -> None:
    """Print the plan as a table, with the reason of each choice."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=plan.name, title_justify="left", box=None, pad_edge=False)
    table.add_column("what", style="bold")
    table.add_column("planned", overflow="fold")
    table.add_column("why", style="dim", overflow="fold")
    for name, value, reason in rows(plan):
        table.add_row(name, value, plan.reasons.get(reason, reason))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def rows(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, value, reason or the name of a reason) of each line of the table."""
    active = f", {plan.num_active_parameters:,} active" if active_differs(plan) else ""
    where = f"{plan.world_size} x {plan.device}"
    offload = f", optimizer on {plan.offload_optimizer}" if plan.offload_optimizer != "none" else ""
    offload += f", weights on {plan.offload_params}" if plan.offload_params != "none" else ""
    measured = "an estimate until it is tokenised" if plan.data.is_estimate else "counted"
    batch = f"{plan.global_batch} x {plan.seq_len} tokens"
    split = f"{plan.micro_batch} x {plan.grad_accum} accumulated x {plan.world_size} ranks"
    found = [
        ("hardware", where, plan.device_name),
        ("model", f"{plan.model}, {plan.num_parameters:,} parameters{active}", ""),
        ("data", f"{plan.data.name}, {plan.data.num_train_tokens:,} tokens", measured),
        ("steps", f"{plan.num_steps:,} of {batch}", "num_steps"),
        ("tokens", f"{plan.num_tokens:,} ({plan.num_epochs:.2f} epochs)", ""),
        ("batch", split, "micro_batch"),
        ("learning rate", f"{plan.learning_rate:g}, {plan.warmup_steps} warm-up steps", "warmup_steps"),
        ("precision", plan.precision, "precision"),
        ("ZeRO", f"stage {plan.zero_stage}{offload}", "zero_stage"),
        ("recomputation", plan.activation_checkpointing, "activation_checkpointing"),
        ("attention", plan.attention, "attention"),
    ]
    if plan.scan_kernel:
        found.append(("scan", plan.scan_kernel, "scan_kernel"))
    peak = f"about {plan.memory['device_peak_gib']:.2f} GiB a device"
    documents = "documents follow each other in a sequence and see each other"
    found.append(("memory", peak, components(plan)))
    found.append(("arithmetic", f"{plan.flops_per_token:.3g} FLOPs a token", "matrix products only"))
    found.append(("documents", plan.reasons.get("documents", "packed"), documents))
    found.append(("evaluation", f"every {plan.eval_every} steps", f"{plan.eval_sequences} sequences"))
    found.append(("checkpoint", f"every {plan.checkpoint_every} steps", ""))
    return found


def active_differs(plan: Plan) -> bool:
    return plan.num_active_parameters != plan.num_parameters


def components(plan: Plan) -> str:
    parts = plan.memory["components"].items()
    return ", ".join(f"{name} {value:.2f}" for name, value in parts if value >= 0.005)


def plan_command(config: RunConfig) -> None:
    """Print what a run would be; nothing is written but the cache of the model's size."""
    from llmtrain.data.shards import find_manifest

    check(config)
    manifest = find_manifest(config.data, config.cache, config.model.path)
    plan = make_plan(config, manifest)
    if config.format is Format.json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        show_plan(plan)


if __name__ == "__main__":
    from llmtrain import compose

    sys.exit(compose.main(plan_command, "plan", "Print the plan of a run: what it would be, anywhere."))
