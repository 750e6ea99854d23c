"""One rank's view of a run: what was decided, and what is going on."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmtrain.config import RunConfig
from llmtrain.folder import RunFolder
from llmtrain.heartbeat import Heartbeat
from llmtrain.hooks import Hooks
from llmtrain.metrics import Metrics, read_records
from llmtrain.plan import Plan
from llmtrain.ranks import Ranks
from llmtrain.stability import Stability

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from llmtrain.checkpoint import Saver
    from llmtrain.data.sequences import Sequences
    from llmtrain.data.shards import Manifest
    from llmtrain.data.teacher_cache import TeacherCache


@dataclass
class Sums:
    """What has gathered since the last record; tensors stay on the device until one is due."""

    loss: Any = 0.0
    tokens: int = 0
    sequences: int = 0
    steps: int = 0
    skipped: int = 0
    extras: dict[str, Any] = field(default_factory=dict)
    start: float = 0.0

    def add(self, step: "Sums") -> None:
        """Take one step in, of which only the time counts where it was skipped."""
        self.steps += step.steps
        self.skipped += step.skipped
        self.sequences += step.sequences
        if not step.skipped:
            # In doubles a sum of a few floats is exact: a resume in its middle changes no bit.
            self.loss = self.loss + step.loss
            self.tokens += step.tokens
            for name, value in step.extras.items():
                self.extras[name] = self.extras.get(name, 0.0) + value

    def saved(self, over_ranks: Callable[[float], float]) -> dict[str, Any]:
        """For a checkpoint between two records: totals over all ranks, and the seconds so far."""
        return {
            "loss": over_ranks(float(self.loss)),
            "tokens": self.tokens,
            "sequences": self.sequences,
            "steps": self.steps,
            "skipped": self.skipped,
            "extras": {name: over_ranks(float(value)) for name, value in self.extras.items()},
            "seconds": time.perf_counter() - self.start,
        }

    @classmethod
    def restored(cls, saved: dict[str, Any], is_first: bool) -> "Sums":
        """The totals again, on the first rank alone: they are summed over ranks once more."""
        share = 1.0 if is_first else 0.0
        extras = {name: share * value for name, value in saved["extras"].items()}
        skipped = saved.get("skipped", 0)  # versions before skipped none
        counts = (saved["tokens"], saved["sequences"], saved["steps"], skipped)
        return cls(share * saved["loss"], *counts, extras, -saved["seconds"])

    def start_clock(self) -> None:
        """Begin to count now, what was restored included."""
        self.start = time.perf_counter() + min(self.start, 0.0)


@dataclass
class Run:
    """Everything that the loop needs, on this rank.

    ``control`` is a process group on the host, for numbers that no device has to wait for.
    ``metrics`` is None on every rank but the first, and ``hooks`` are empty there. ``is_ended``
    says on all ranks that a callback asked for the end.
    """

    config: RunConfig
    plan: Plan
    folder: RunFolder
    manifest: "Manifest"
    ranks: Ranks
    device: "torch.device"
    engine: "DeepSpeedEngine"
    control: Any
    peak_tflops: float | None
    sequences: "Sequences" = field(init=False)
    saver: "Saver" = field(init=False)
    targets: "TeacherCache | None" = None
    metrics: Metrics | None = None
    step: int = 0
    best_loss: float = math.inf
    best_step: int | None = None
    elapsed_seconds: float = 0.0
    is_stopping: bool = False
    is_ended: bool = False
    sums: Sums = field(default_factory=Sums)
    heartbeat: Heartbeat = field(default_factory=Heartbeat.inherited)
    stability: Stability = field(default_factory=Stability)
    hooks: Hooks = field(default_factory=Hooks)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What is done inside is no part of a step's time."""
        start = time.perf_counter()
        with self.heartbeat.aside():
            yield
        self.sums.start += time.perf_counter() - start

    @property
    def is_last_step(self) -> bool:
        return self.is_ended or self.step >= self.plan.num_steps

    @property
    def eta_seconds(self) -> float | None:
        """What the steps left will take at the mean pace so far; None before the first."""
        if self.step == 0:
            return None
        seconds = self.elapsed_seconds + time.perf_counter() - self.sums.start
        return (self.plan.num_steps - self.step) * seconds / self.step

    def record(self, values: dict[str, Any]) -> None:
        """On the first rank, add a record and show it to the callbacks."""
        if self.metrics is not None:
            self.hooks.tell(self.metrics.record(values))

    def renew_hooks(self) -> None:
        """On the first rank, have the callbacks be as they were after the records so far."""
        records = read_records(self.folder.metrics) if self.config.callback else []
        self.hooks = Hooks.resumed(self.config.callback, records)

    def sum(self, value: float) -> float:
        """A number summed over all ranks, in double precision."""
        self.heartbeat.sign()
        if self.ranks.world_size == 1:
            return value
        import torch
        import torch.distributed as dist

        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return float(total)

    def said_by_first(self, text: str | None) -> str:
        """What the first rank says, on all."""
        import torch.distributed as dist

        said = [text]
        dist.broadcast_object_list(said, src=0, group=self.control)
        return str(said[0])

    def any(self, value: bool) -> bool:
        """Whether something holds on any rank."""
        return self.sum(float(value)) > 0

    @cached_property
    def held_out(self) -> "Sequences":
        """The held-out split, put into sequences once."""
        return self.open_split("held_out")

    def open_split(self, split: str) -> "Sequences":
        """The sequences of a split; of the held-out one, all that there is."""
        from llmtrain.data.sequences import open_sequences

        return open_sequences(
            self.manifest,
            split,
            self.plan.seq_len,
            keep_apart=self.plan.keep_documents_apart,
            packing=self.plan.packing,
            cover_all=split == "held_out",
        )

    def batch(self, sequences: "Sequences", indices: Any) -> dict[str, Any]:
        """The model's keyword arguments for some sequences, and their labels, on the host."""
        import torch

        arrays: dict[str, Any] = dict(sequences.batch(indices))
        if self.targets is not None and sequences is self.sequences:
            arrays["teacher_ids"], arrays["teacher_probs"] = self.targets.read(indices)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch where the model is."""
        return {name: values.to(self.device) for name, values in batch.items()}
