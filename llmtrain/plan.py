"""Every number that is derived from a config, in one frozen object; and the plan command."""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.choose import (
    accumulates_in_fp32,
    check_documents,
    check_length,
    check_stage,
    choose_attention,
    choose_layout,
    choose_precision,
    choose_scan,
    fits,
)
from llmtrain.config import Format, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine, resolve
from llmtrain.memory import Memory, estimate
from llmtrain.model.causal_lm import Facts
from llmtrain.plan_table import show_plan
from llmtrain.schema import check_bounds
from llmtrain.throughput import flops_per_token

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest

MOST_EPOCHS = 4  # more passes over the same text teach little (Muennighoff et al. 2023)
DEBUG_STEPS = 5


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
    reduce_scatter: bool
    has_fp32_accumulation: bool
    activation_checkpointing: str
    seq_len: int
    keep_documents_apart: bool
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
    asked = [
        name for name in ("max_steps", "max_tokens", "max_epochs") if getattr(config.train, name)
    ]
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
        raise ConfigError(
            "name", config.name, "cannot name a folder", "leave out / and a leading dot"
        )
    if config.resume not in ("auto", "never"):
        reason = "is not one of the ways to start"
        raise ConfigError("resume", config.resume, reason, "give auto or never")


def check_recomputation(config: RunConfig) -> None:
    value = config.train.activation_checkpointing
    if (
        value is not None
        and value not in ("none", "full")
        and not (value.isdigit() and int(value) > 0)
    ):
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
    check_documents(config, facts)
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
        name=f"{config.name}-{config.identity}{'-debug' if config.debug else ''}",
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
        reduce_scatter=not config.optimizer.whole_gradients,
        has_fp32_accumulation=accumulates_in_fp32(layout, config.optimizer.whole_gradients),
        activation_checkpointing=layout.activation_checkpointing,
        seq_len=config.train.seq_len,
        keep_documents_apart=config.data.keep_documents_apart,
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


def check_vocabulary(facts: Facts, manifest: "Manifest | None") -> None:
    if manifest is not None and manifest.vocabulary.size > facts.vocab_size:
        size = manifest.vocabulary.size
        reason = f"is smaller than the tokenizer's {size} entries"
        remedy = f"set it to {-(-size // 64) * 64} or take a smaller tokenizer"
        raise ConfigError("model.config.vocab_size", facts.vocab_size, reason, remedy)


def does_not_fit(plan: Plan, memory: Memory, machine: Machine) -> ConfigError:
    on_host = memory.host_peak_gib * machine.gpus_per_node
    reason = (
        f"needs about {memory.device_peak_gib:.1f} GiB on each device, which has "
        f"{machine.memory_gib:.1f}, and {on_host:.1f} GiB on the host, which has "
        f"{machine.host_memory_gib:.1f}"
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
    if config.debug:
        reasons["num_steps"] = "debug"
        return DEBUG_STEPS
    if train.max_steps:
        reasons["num_steps"] = "train.max_steps"
        return train.max_steps
    if train.max_tokens or train.max_epochs:
        reasons["num_steps"] = "train.max_tokens" if train.max_tokens else "train.max_epochs"
        horizon = (train.max_tokens, train.max_epochs)
    else:
        reasons["num_steps"] = f"the horizon of {config.model.name}'s recipe"
        horizon = (recipe.max_tokens, recipe.max_epochs)
    max_tokens, max_epochs = horizon
    tokens = max_tokens or (max_epochs or 1.0) * data.num_train_tokens
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
    return found


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

    sys.exit(
        compose.main(plan_command, "plan", "Print the plan of a run: what it would be, anywhere.")
    )
