"""A plan: every number that is derived from a config, in one frozen object."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtrain.horizon import Corpus

DTYPES = {"bf16": "bfloat16", "bf16_pure": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Plan:
    """What will happen, decided. Sizes in GiB, rates in FLOP/s with their prefix, times in seconds.

    ``peak_tflops`` is one device's and null where it is not known or, on a CPU, measured at the
    start. ``asked`` is a hash of the config that it was made from. ``step_seconds`` and what
    follows from it are null where nothing is known of the machine's rates. ``alternatives`` are the
    other ways to spread the run, the best first, each with why it was refused, if it was.
    ``code_fingerprint`` is of an architecture of ours.
    """

    name: str
    asked: str
    device: str
    device_name: str
    memory_gib: float
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
    saves_behind: bool
    data: Corpus
    peak_tflops: float | None
    memory: dict[str, Any]
    fits: bool
    refusal: str | None
    step_seconds: float | None
    total_hours: float | None
    gpu_hours: float | None
    energy_kwh: float | None
    money: float | None
    alternatives: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    reasons: dict[str, str]
    code_fingerprint: str | None = None
    has_wide_products: bool = False

    @property
    def dtype_name(self) -> str:
        """torch's name for the dtype that the model multiplies in."""
        return DTYPES[self.precision]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        tuples = {name: tuple(values[name]) for name in ("warnings", "alternatives")}
        return cls(**values | tuples | {"data": Corpus(**values["data"])})

    @classmethod
    def load(cls, path: Path) -> "Plan":
        return cls.from_json(json.loads(path.read_text()))
