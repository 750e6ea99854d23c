"""Every number that is derived from a config, in one frozen object; and the plan command."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.checks import check, check_model, check_stage, check_teacher
from llmtrain.choose import choose_attention, choose_precision, choose_scan
from llmtrain.config import Format, RunConfig
from llmtrain.data.corpus import digest
from llmtrain.data.sequences import open_sequences
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine, resolve
from llmtrain.horizon import Corpus, choose_horizon
from llmtrain.layout import accumulates_in_fp32, choose_layout, fits
from llmtrain.memory import Layout, Memory, estimate, weights_of
from llmtrain.model.facts import Facts
from llmtrain.plan_table import show_plan
from llmtrain.throughput import flops_per_token

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest

DTYPES = {"bf16": "bfloat16", "bf16_pure": "bfloat16", "fp16": "float16", "fp32": "float32"}
MOST_EPOCHS = 4  # more passes over the same text teach little (Muennighoff et al. 2023)


@dataclass(frozen=True)
class Plan:
    """What will happen, decided. Sizes in GiB, rates in FLOP/s with their prefix, times in seconds.

    ``peak_tflops`` is one device's and null where it is not known or, on a CPU, measured at the
    start. ``asked`` is a hash of the config that it was made from. ``step_seconds`` and
    ``total_hours`` are null: they are not predicted yet.
    """

    name: str
    asked: str
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
    max_seq_len: int | None
    weights_fingerprint: str | None
    adapter: str
    num_trainable_parameters: int
    teacher: str | None
    teacher_fingerprint: str | None
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
    packing: bool
    keep_documents_apart: bool
    global_batch: int
    micro_batch: int
    grad_accum: int
    tokens_per_step: int
    num_steps: int
    num_tokens: int
    num_epochs: float
    warmup_steps: int
    optimizer: str
    learning_rate: float
    grad_clip: float
    log_every: int
    eval_every: int
    eval_sequences: int
    final_eval_sequences: int
    checkpoint_every: int
    data: Corpus
    peak_tflops: float | None
    memory: dict[str, Any]
    fits: bool
    step_seconds: float | None
    total_hours: float | None
    warnings: tuple[str, ...]
    reasons: dict[str, str]

    @property
    def dtype_name(self) -> str:
        """torch's name for the dtype that the model multiplies in."""
        return DTYPES[self.precision]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        values = values | {"data": Corpus(**values["data"]), "warnings": tuple(values["warnings"])}
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> "Plan":
        return cls.from_json(json.loads(path.read_text()))


def make_plan(config: RunConfig, manifest: "Manifest | None" = None) -> Plan:
    """Derive everything. Without a manifest the corpus's size is an estimate, and marked as one.

    Raises ConfigError for anything that cannot work or does not fit.
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
    num_trainable = config.adapter.num_trainable(facts)
    frozen_bytes = config.adapter.weight_bytes
    weights = weights_of(facts, precision, num_trainable, frozen_bytes, teacher)
    layout = choose_layout(config, machine, facts, precision, attention, weights, reasons)
    memory = estimate(facts, layout, config.optimizer.state_bytes, weights)
    if not fits(memory, machine):
        raise does_not_fit(config, memory, machine)
    data = describe_data(config, manifest)
    horizon = choose_horizon(config, data, reasons)
    plan = Plan(
        **vars(layout),
        **vars(horizon),
        **of_machine(machine, precision),
        **of_model(config, facts, teacher),
        **of_training(config, layout),
        scan_kernel=choose_scan(config.model, machine, facts, reasons),
        data=data,
        memory=memory_json(memory),
        fits=True,
        step_seconds=None,
        total_hours=None,
        warnings=(),
        reasons=reasons,
    )
    return replace(plan, warnings=(*warn(plan), *warn_of_rate(config)))


def of_machine(machine: Machine, precision: str) -> dict[str, Any]:
    """The fields of a plan that are the machine's."""
    return {
        "device": machine.device,
        "device_name": machine.device_name,
        "gpus_per_node": machine.gpus_per_node,
        "num_nodes": machine.num_nodes,
        "threads_per_rank": max(1, machine.num_cores // machine.gpus_per_node),
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
        "adapter": config.adapter.kind,
        "num_trainable_parameters": config.adapter.num_trainable(facts),
        "teacher": config.teacher.name if config.teacher else None,
        "teacher_fingerprint": config.teacher.weights_fingerprint() if config.teacher else None,
    }


def of_training(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """The fields of a plan that were asked for, or follow at once."""
    whole_gradients = config.optimizer.whole_gradients
    return {
        "asked": hashlib.sha256(config.to_yaml().encode()).hexdigest()[:16],
        "name": f"{config.name}-{config.identity}{'-debug' if config.debug else ''}",
        "nvme_path": config.zero.nvme_path,
        "reduce_scatter": not whole_gradients,
        "has_fp32_accumulation": accumulates_in_fp32(layout, whole_gradients),
        "packing": packs(config),
        "keep_documents_apart": config.data.keeps_apart and packs(config),
        "global_batch": config.train.global_batch,
        "grad_accum": config.train.global_batch // (layout.world_size * layout.micro_batch),
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
        sizes = (max(1, tokens), max(1, tokens // seq_len), max(1, num_held_out))
        return Corpus(data.name, *sizes, is_estimate=True, fingerprint=None)
    train = open_sequences(manifest, "train", seq_len, packing=packs(config))
    held_out = open_sequences(manifest, "held_out", seq_len, packing=packs(config), cover_all=True)
    return Corpus(
        name=data.name,
        num_train_tokens=train.num_inputs,
        num_train_sequences=len(train),
        num_held_out_sequences=len(held_out),
        is_estimate=False,
        fingerprint=digest([manifest.train.sha, manifest.held_out.sha]),
        num_rows=manifest.train.num_documents if manifest.has_masks else None,
        num_cut=train.num_cut,
        num_left_out=train.num_left_out,
        num_skipped=manifest.num_skipped,
        first_skipped=manifest.skipped[0] if manifest.skipped else None,
    )


def packs(config: RunConfig) -> bool:
    """Whether a sequence holds several documents: the data allows it, and the mode."""
    return bool(config.data.packs and config.mode.packs)


def does_not_fit(config: RunConfig, memory: Memory, machine: Machine) -> ConfigError:
    on_host = memory.host_peak_gib * machine.gpus_per_node
    reason = (
        f"needs about {memory.device_peak_gib:.1f} GiB on each device, which has "
        f"{machine.memory_gib:.1f}, and {on_host:.1f} GiB on the host, which has "
        f"{machine.host_memory_gib:.1f}"
    )
    remedy = "take a smaller model, a shorter train.seq_len or more devices"
    return ConfigError("model", config.model.name, reason, remedy)


def memory_json(memory: Memory) -> dict[str, Any]:
    host = {f"host {name}": value for name, value in memory.host.items()}
    return {
        "device_peak_gib": memory.device_peak_gib,
        "host_peak_gib": memory.host_peak_gib,
        "components": memory.device | host,
    }


def warn(plan: Plan) -> list[str]:
    """What is allowed and probably not meant."""
    found = warn_of_rows(plan)
    if plan.data.num_rows is None and plan.num_epochs > MOST_EPOCHS:
        found.append(
            f"{plan.num_tokens:,} tokens are {plan.num_epochs:,.0f} passes over the "
            f"{plan.data.num_train_tokens:,} tokens of data={plan.data.name}: past {MOST_EPOCHS} "
            "passes little is learned. Take more data (FineWeb-Edu, say: data=text "
            "data.path=<its parquet files>) or a shorter horizon."
        )
    return found


def warn_of_rate(config: RunConfig) -> list[str]:
    """A model that starts afresh learns little at the rate of fine-tuning, which rows bring."""
    sensible = config.model.recipe.lr
    if (
        config.model.path is not None
        or not config.data.has_masks
        or config.optimizer.lr >= sensible
    ):
        return []
    return [
        f"optimizer.lr={config.optimizer.lr:g} suits models that are fine-tuned, and "
        f"model={config.model.name} starts afresh: its own is optimizer.lr={sensible:g}."
    ]


def warn_of_rows(plan: Plan) -> list[str]:
    """Rows that are not trained on as they are."""
    data, found = plan.data, []
    if data.num_skipped:
        found.append(f"{data.num_skipped:,} rows are skipped, the first: {data.first_skipped}")
    if data.num_cut:
        found.append(
            f"{data.num_cut:,} of {data.num_rows:,} rows are longer than train.seq_len="
            f"{plan.seq_len} and lose their end; {data.num_left_out:,} of them have no answer "
            "left and are left out."
        )
    return found


def plan_command(config: RunConfig) -> None:
    """Print what a run would be; nothing is written but the cache of the model's size."""
    from llmtrain.data.shards import find_manifest

    check(config)
    manifest = find_manifest(config.data, config.cache, config.tokenizer_path)
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
