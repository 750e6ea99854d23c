"""The typed tree of an experiment, its identity, and how a run folder gives it back."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llmtrain.hardware import Hardware
from llmtrain.on_finish import OnFinish
from llmtrain.schema import (
    GROUPS,
    SEVERAL,
    learned,
    learned_values,
    part_of_values,
    unlearned,
    unlearned_part,
)
from llmtrain.stability import OnDivergence


class Precision(Enum):
    bf16 = "bf16"
    bf16_pure = "bf16_pure"
    fp16 = "fp16"
    fp32 = "fp32"


class Offload(Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class Format(Enum):
    table = "table"
    json = "json"


@dataclass
class Train:
    """The problem that is learned: lengths, batches and horizon; and how a step is carried out."""

    seq_len: int = learned("???", low=2, high=2**31)
    global_batch: int = learned("???", low=1, high=2**31)
    micro_batch: int | None = unlearned(low=1)
    max_steps: int | None = learned(None, low=1, high=10**12)
    max_tokens: float | None = learned(None, low=1, high=1e18)
    max_epochs: float | None = learned(None, above=0, high=1e9)
    precision: Precision | None = None
    activation_checkpointing: str | None = unlearned()
    compile: bool = unlearned(False)
    grad_clip: float = learned(0.0, low=0)
    log_every: int = unlearned(10, low=1)
    eval_every: int | None = unlearned(low=1)
    eval_batches: int | None = unlearned(low=1)


@dataclass
class Zero:
    """How training state is spread over ranks and memories; ``extra`` goes to DeepSpeed."""

    stage: int | None = unlearned(low=0, high=3)
    offload_optimizer: Offload | None = None
    offload_params: Offload | None = None
    nvme_path: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """Resumable state is saved every so many steps (null: planned).

    The newest ``keep`` stay, and those of every ``keep_every``-th step. They are written while
    training goes on unless ``asynchronous`` is false (null: where there is room for a copy), and
    copied to ``mirror``, a folder on another disk.
    """

    every: int | None = unlearned(low=1)
    keep: int = unlearned(2, low=1)
    keep_every: int | None = unlearned(low=1)
    asynchronous: bool | None = unlearned()
    mirror: str | None = unlearned()


@dataclass
class RunConfig:
    """All that was asked of one run."""

    name: str = unlearned("???")
    seed: int = learned(0, low=0, high=2**32 - 1)
    output_root: str = unlearned("outputs")
    cache_root: str = unlearned("???")
    debug: bool = unlearned(False)
    resume: str = unlearned("auto")
    format: Format = unlearned(Format.table)
    train: Train = field(default_factory=Train)
    zero: Zero = unlearned_part(Zero)
    checkpoint: Checkpoint = unlearned_part(Checkpoint)
    on_finish: OnFinish = unlearned_part(OnFinish)
    on_divergence: OnDivergence = unlearned_part(OnDivergence)
    hardware: Hardware = unlearned_part(Hardware)
    model: Any = None
    teacher: Any = None
    adapter: Any = None
    optimizer: Any = None
    schedule: Any = None
    data: Any = None
    mode: Any = None
    callback: dict[str, Any] = field(default_factory=dict)
    tracker: Any = unlearned()
    launcher: Any = unlearned()
    sweep: Any = unlearned()

    @property
    def identity(self) -> str:
        """8 hex digits over what is learned: where and how fast a run trains does not change it."""
        text = json.dumps(learned_values(self), sort_keys=True, default=plain)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def run_name(self) -> str:
        """The name of the run's folder."""
        return f"{self.name}-{self.identity}{'-debug' if self.debug else ''}"

    @property
    def tokenizer_path(self) -> str | None:
        """Where the stored model's tokenizer lies; a fresh student takes its teacher's."""
        return self.model.path or (self.teacher.path if self.teacher is not None else None)

    @property
    def cache(self) -> Path:
        return Path(self.cache_root or "~/.cache/llmtrain").expanduser()

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.structured(self))


def plain(value: Any) -> Any:
    """An enum as its value, for JSON."""
    return value.value if isinstance(value, Enum) else str(value)


def load(path: Path) -> RunConfig:
    """The config of a run folder's ``config.yaml``, rebuilt without Hydra."""
    return build(OmegaConf.to_container(OmegaConf.load(path)))


def build(values: Any) -> RunConfig:
    """A RunConfig from plain values: each group's ``kind`` names the class that it becomes.

    Raises ConfigError for a group whose kind does not exist.
    """
    parts = {
        name: group_config(name, values[name])
        for name in part_fields()
        if values.get(name) is not None
    }
    rest = {name: value for name, value in values.items() if name not in part_fields()}
    config: RunConfig = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), rest))  # type: ignore[assignment]
    for name, part in parts.items():
        setattr(config, name, part)
    return config


def part_fields() -> list[str]:
    """The fields of RunConfig that hold a part: the groups, and the teacher, which is a model."""
    return [
        item.name for item in fields(RunConfig) if item.name in GROUPS or item.name == "teacher"
    ]


def group_config(name: str, values: dict[str, Any]) -> Any:
    """A group's part from plain values, or its parts by their names."""
    if name in SEVERAL:
        return {key: part_of_values(name, each, f"{name}.{key}") for key, each in values.items()}
    return part_of_values("model" if name == "teacher" else name, values, name)
