"""Weights & Biases."""

import html
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from llmtrain.schema import unlearned, unlearned_part
from llmtrain.tracker.base import Line, Record, Subject, Tracker, numbers


class Mode(Enum):
    online = "online"
    offline = "offline"


@dataclass
class WandB(Tracker):
    """A run of ``project``, called ``name`` (null: as the run folder).

    ``offline`` writes into the run folder. W&B cannot continue such a run, so each start writes all
    records from the first on: of several folders the newest is the whole run.
    """

    kind: str = "wandb"
    project: str = unlearned("???")
    entity: str | None = unlearned()
    name: str | None = unlearned()
    group: str | None = unlearned()
    tags: list[str] = unlearned_part(list)
    mode: Mode = unlearned(Mode.online)

    package: ClassVar[str] = "wandb"

    @property
    def remembers(self) -> bool:
        return self.mode is Mode.online

    def join(self, sweep: str) -> None:
        self.group = self.group or sweep

    def open(self, subject: Subject) -> Line:
        import wandb

        run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or subject.name,
            group=self.group,
            tags=self.tags or None,
            mode=self.mode.value,
            id=subject.id or uuid.uuid4().hex[:12],
            resume="allow" if self.remembers else None,
            dir=subject.folder,
            config={**subject.config, "plan": subject.plan},
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )
        # W&B's own steps only rise, and a run may go back to a checkpoint.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return WandBLine(run)


class WandBLine:
    """One run of W&B's."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.id = str(run.id)

    def log(self, records: Sequence[Record]) -> None:
        for record in records:
            self.run.log(numbers(record))

    def sample(self, step: int, text: str) -> None:
        import wandb

        self.run.log({"step": step, "sample": wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self, state: str, summary: Record) -> None:
        self.run.summary.update({"state": state, **numbers(summary)})
        self.run.finish(exit_code=1 if state == "failed" else 0)
