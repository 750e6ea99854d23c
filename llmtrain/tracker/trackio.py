"""Trackio, on this machine or in a Space."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmtrain.schema import unlearned
from llmtrain.tracker.base import Line, Record, Subject, Tracker, numbers


@dataclass
class Trackio(Tracker):
    """A run of ``project``, in trackio's folder on this machine (null) or in ``space_id``."""

    kind: str = "trackio"
    project: str = unlearned("???")
    space_id: str | None = unlearned()
    group: str | None = unlearned()

    package: ClassVar[str] = "trackio"

    def join(self, sweep: str) -> None:
        self.group = self.group or sweep

    def open(self, subject: Subject) -> Line:
        import trackio

        run = trackio.init(
            project=self.project,
            name=subject.name,
            group=self.group,
            space_id=self.space_id,
            config={**subject.config, "plan": subject.plan},
            resume="allow",  # it knows its runs by their names
            embed=False,
            auto_log_gpu=False,
        )
        return TrackioLine(run)


class TrackioLine:
    """One run of trackio's."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.id = str(run.name)

    def log(self, records: Sequence[Record]) -> None:
        for record in records:
            figures = numbers(record)
            self.run.log(figures, step=int(figures.pop("step")))

    def sample(self, step: int, text: str) -> None:
        import trackio

        self.run.log({"sample": trackio.Markdown(f"```\n{text}\n```")}, step=step)

    def close(self, state: str, summary: Record) -> None:
        if figures := numbers(summary):
            figures = {f"summary/{name}": value for name, value in figures.items()}
            self.run.log(figures, step=int(summary["num_steps"]))
        self.run.finish()
