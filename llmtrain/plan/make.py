"""From a config to its plan."""

import hashlib
from dataclasses import replace
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Any

from llmtrain.checks import (
    check,
    check_model,
    check_stage,
    check_teacher,
)
from llmtrain.choose import (
    choose_attention,
    choose_precision,
    choose_products,
    choose_scan,
    warn_of_precision,
)
from llmtrain.config import RunConfig
from llmtrain.data.corpus import digest
from llmtrain.data.sequences import open_sequences
from llmtrain.hardware import Machine, resolve
from llmtrain.horizon import Corpus, choose_horizon
from llmtrain.layout import (
    Candidate,
    Problem,
    accumulates_in_fp32,
    accumulation,
    choose_layout,
    lack,
)
from llmtrain.memory import Layout, Memory
from llmtrain.model.facts import Facts
from llmtrain.offloading import check_weights_on_disk
from llmtrain.plan.clock import clock
from llmtrain.plan.record import DTYPES, Plan
from llmtrain.plan.warn import (
    check_time,
    warn,
    warn_of_disk,
    warn_of_doubt,
    warn_of_rate,
)
from llmtrain.roofline import Cost, cost_of
from llmtrain.throughput import flops_per_token
from llmtrain.trace import Setting, Trace
from llmtrain.tracing import trace

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest


def make_plan(config: RunConfig, manifest: "Manifest | None" = None) -> Plan:
    """Derive everything. Without a manifest the corpus's size is an estimate, and marked as one.

    Raises ConfigError for anything that cannot work. What does not fit is said in the plan.
    """
    check(config)
    machine = resolve(config.hardware)
    check_stage(config, machine)
    facts = config.model.facts(config.cache)
    check_model(config, facts, manifest)
    teacher = teacher_facts(config)
    reasons: dict[str, str] = {}
    precision = choose_precision(config, machine, reasons)
    attention = choose_attention(config, machine, facts, precision, reasons)
    scan_kernel = choose_scan(config.model, machine, facts, reasons)
    is_wide = choose_products(config, machine, precision, reasons)
    data = describe_data(config, manifest)
    problem = problem_of(config, machine, precision, attention, scan_kernel, is_wide, data)
    chosen, *others = choose_layout(problem, reasons)
    if chosen.layout.offload_params == "nvme":
        check_weights_on_disk(machine.device, machine.world_size, precision)
    horizon = choose_horizon(config, data, reasons)
    memory, saves_behind = with_saving(config, chosen.memory, machine)
    refusal = chosen.refusal or lack(memory, machine)
    plan = Plan(
        **vars(chosen.layout),
        **vars(horizon),
        **of_machine(machine, precision),
        **of_model(config, facts, teacher),
        **of_training(config, chosen.layout),
        scan_kernel=scan_kernel,
        data=data,
        saves_behind=saves_behind,
        memory=memory_json(memory),
        fits=refusal is None,
        refusal=refusal,
        step_seconds=chosen.seconds,
        **of_time(chosen.seconds, horizon.num_steps, machine),
        alternatives=tuple(alternative(one) for one in others),
        warnings=(),
        reasons=reasons,
        has_wide_products=is_wide,
    )
    doubt = problem.trace_of(chosen.layout.activation_checkpointing).doubt
    found = (
        *warn(plan),
        *warn_of_rate(config),
        *warn_of_precision(config.model, machine, precision),
        *warn_of_disk(plan, machine),
        *warn_of_doubt(doubt),
    )
    check_time(plan, machine)
    return replace(plan, warnings=found)


def problem_of(
    config: RunConfig,
    machine: Machine,
    precision: str,
    attention: str,
    scan_kernel: str | None,
    is_wide: bool,
    data: Corpus,
) -> Problem:
    """What a layout is sought for: traces are made, and rates measured, when one is asked for."""

    @cache
    def trace_of(recompute: str) -> Trace:
        return trace(config, setting(recompute))

    def setting(recompute: str) -> Setting:
        is_packed = bool(config.data.keeps_apart and packs(config))
        threads = threads_of(machine)
        return traced_setting(
            precision,
            attention,
            scan_kernel,
            recompute,
            machine.device,
            threads,
            is_packed,
            is_wide,
            data.learned_share,
        )

    return Problem(config, machine, precision, attention, trace_of, clock(config, machine))


def with_saving(config: RunConfig, memory: Memory, machine: Machine) -> tuple[Memory, bool]:
    """Whether checkpoints are written while training goes on; the memory that this takes.

    Unless it was asked for, it is done where there is room for a copy.
    """
    more, wanted = memory.with_copy(machine.device), config.checkpoint.asynchronous
    if wanted is None:
        wanted = lack(memory, machine) is None and lack(more, machine) is None
    return (more if wanted else memory), wanted


def threads_of(machine: Machine) -> int:
    """The cores of one rank."""
    return max(1, machine.num_cores // machine.gpus_per_node)


def of_time(seconds: float | None, num_steps: int, machine: Machine) -> dict[str, Any]:
    """The fields of a plan that follow from a step's time; null where that is not known."""
    if seconds is None:
        return dict.fromkeys(("total_hours", *Cost._fields))
    hours = seconds * num_steps / 3600
    return {"total_hours": hours, **cost_of(hours, machine)._asdict()}


def alternative(candidate: Candidate) -> dict[str, Any]:
    """A way to spread the run that was not taken, for programs and for the table."""
    layout = candidate.layout
    return {
        "zero_stage": layout.zero_stage,
        "offload_optimizer": layout.offload_optimizer,
        "offload_params": layout.offload_params,
        "activation_checkpointing": layout.activation_checkpointing,
        "micro_batch": layout.micro_batch,
        "device_peak_gib": candidate.memory.device_peak_gib,
        "host_peak_gib": candidate.memory.host_peak_gib,
        "step_seconds": candidate.seconds,
        "refusal": candidate.refusal,
    }


def setting_of(plan: Plan) -> Setting:
    """What a plan's model is traced under."""
    return traced_setting(
        plan.precision,
        plan.attention,
        plan.scan_kernel,
        plan.activation_checkpointing,
        plan.device,
        plan.threads_per_rank,
        plan.keep_documents_apart,
        plan.has_wide_products,
        plan.data.learned_share,
    )


def traced_setting(
    precision: str,
    attention: str,
    scan_kernel: str | None,
    recompute: str,
    device: str,
    threads: int,
    is_packed: bool,
    is_wide: bool,
    learned_share: float,
) -> Setting:
    """As few settings as there are differences: on a CPU the blocks of a scan alone depend on
    threads. Some micro-batches are learned more than the mean."""
    has_blocks = device == "cpu" and scan_kernel is not None
    threads = threads if has_blocks else 1
    sixteenths = min(16, ceil(16 * learned_share + 0.25))
    return Setting(
        *(DTYPES[precision], attention, scan_kernel, recompute, device, threads),
        *(is_packed, is_wide, sixteenths / 16),
    )


def of_machine(machine: Machine, precision: str) -> dict[str, Any]:
    """The fields of a plan that are the machine's."""
    return {
        "device": machine.device,
        "device_name": machine.device_name,
        "memory_gib": machine.memory_gib,
        "gpus_per_node": machine.gpus_per_node,
        "num_nodes": machine.num_nodes,
        "threads_per_rank": threads_of(machine),
        "peak_tflops": machine.peak_tflops.get(precision.removesuffix("_pure")),
    }


def of_model(config: RunConfig, facts: Facts, teacher: Facts | None) -> dict[str, Any]:
    """The fields of a plan that are the model's, its adapter's and its teacher's."""
    seq_len, freezes = config.train.seq_len, config.adapter.freezes
    return {
        "model": config.model.name,
        "num_parameters": facts.num_parameters,
        "num_active_parameters": facts.num_active_parameters,
        "flops_per_token": flops_per_token(facts, seq_len, freezes, teacher),
        "vocab_size": facts.vocab_size,
        "max_seq_len": facts.max_seq_len,
        "weights_fingerprint": config.model.weights_fingerprint(),
        "code_fingerprint": config.model.code_fingerprint(),
        "adapter": config.adapter.kind,
        "num_trainable_parameters": config.adapter.num_trainable(facts),
        "teacher": config.teacher.name if config.teacher else None,
        "teacher_fingerprint": config.teacher.weights_fingerprint() if config.teacher else None,
    }


def hash_of(config: RunConfig) -> str:
    return hashlib.sha256(config.to_yaml().encode()).hexdigest()[:16]


def of_training(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """The fields of a plan that were asked for, or follow at once."""
    whole_gradients = config.optimizer.whole_gradients
    return {
        "asked": hash_of(replace(config, sweep=None, tracker=None)),
        "name": config.run_name,
        "nvme_path": config.zero.nvme_path,
        "reduce_scatter": not whole_gradients,
        "has_fp32_accumulation": accumulates_in_fp32(layout, whole_gradients),
        "packing": packs(config),
        "keep_documents_apart": config.data.keeps_apart and packs(config),
        "global_batch": config.train.global_batch,
        "grad_accum": accumulation(config, layout),
        "optimizer": config.optimizer.kind,
        "learning_rate": config.optimizer.lr,
        "grad_clip": config.train.grad_clip,
        "log_every": config.train.log_every,
    }


def teacher_facts(config: RunConfig) -> Facts | None:
    """Those of a teacher that is read in every step; one that is asked before takes nothing then.

    Raises ConfigError for a teacher that cannot read the student's sequences.
    """
    if config.teacher is None:
        return None
    facts: Facts = config.teacher.facts(config.cache)
    check_teacher(config, facts)
    return facts if reads_teacher(config) else None


def reads_teacher(config: RunConfig) -> bool:
    """Whether a teacher is read in every step, rather than asked once before."""
    return config.teacher is not None and not config.mode.caches_targets


def describe_data(config: RunConfig, manifest: "Manifest | None") -> Corpus:
    """The corpus's size: exact from its manifest, else an estimate."""
    data, seq_len = config.data, config.train.seq_len
    if manifest is None:
        tokens = data.estimate_tokens()
        num_held_out = int(tokens * (data.held_out_fraction or 0.05)) // seq_len
        num_sequences = max(1, tokens // seq_len)
        sizes = (num_sequences * seq_len, num_sequences, max(1, num_held_out))
        return Corpus(data.name, *sizes, is_estimate=True, fingerprint=None)
    train = open_sequences(manifest, "train", seq_len, packing=packs(config))
    held_out = open_sequences(manifest, "held_out", seq_len, packing=packs(config), cover_all=True)
    return Corpus(
        name=data.name,
        num_train_tokens=train.num_inputs,
        num_train_sequences=len(train),
        num_held_out_sequences=len(held_out),
        is_estimate=False,
        fingerprint=digest([manifest.train.sha, manifest.held_out.sha, *manifest.sources]),
        learned_share=min(1.0, manifest.train.num_learned_tokens / (len(train) * seq_len)),
        num_rows=manifest.train.num_documents if manifest.has_masks else None,
        num_cut=train.num_cut,
        num_left_out=train.num_left_out,
        num_skipped=manifest.num_skipped,
        first_skipped=manifest.skipped[0] if manifest.skipped else None,
        most_sequences=getattr(train, "num_draws", None),
    )


def packs(config: RunConfig) -> bool:
    """Whether a sequence holds several documents: the data allows it, and the mode."""
    return bool(config.data.packs and config.mode.packs)


def memory_json(memory: Memory) -> dict[str, Any]:
    host = {f"host {name}": value for name, value in memory.host.items()}
    return {
        "device_peak_gib": memory.device_peak_gib,
        "host_peak_gib": memory.host_peak_gib,
        "live_gib": memory.live_gib,
        "reserved_gib": memory.reserved_gib,
        "disk_gib": memory.disk_gib,
        "checkpoint_gib": memory.checkpoint_gib,
        "moment": memory.moment,
        "components": memory.device | host,
    }
