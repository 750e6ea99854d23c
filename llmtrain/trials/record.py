"""A sweep's folder: what was tried there, how it turned out, and where each run lies."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.config import RunConfig
from llmtrain.errors import is_disk_full
from llmtrain.folder import RunFolder, finite, write_json

OVER = ("done", "pruned", "failed", "refused")


@dataclass
class Trial:
    """One point and what has become of it.

    ``state`` is waiting, running, planned or queued (on a cluster), stopped, or how it ended: done,
    pruned, failed, refused. ``values`` are those of the objectives; ``words`` all that its own
    command line would say, ``params`` what it varies.
    """

    number: int
    words: list[str]
    params: dict[str, Any]
    config: RunConfig | None = None
    folder: RunFolder | None = None
    state: str = "waiting"
    values: list[float] | None = None
    error: str | None = None
    steps_told: set[int] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    def refuse(self, error: str) -> None:
        self.state, self.error = "refused", error

    def to_json(self, sweep: Path) -> dict[str, Any]:
        """As it stands in sweep.json; the folder is seen from there."""
        run = self.folder
        values = None if self.values is None else [finite(value) for value in self.values]
        return {
            "number": self.number,
            "folder": None if run is None else os.path.relpath(run.path, sweep),
            "params": self.params,
            "state": self.state,
            "values": values,
            "error": self.error,
        }


def run_folder(config: RunConfig) -> RunFolder:
    """Where the command of a config would train."""
    return RunFolder(Path(config.output_root) / config.run_name)


class SweepFolder:
    """All paths of one sweep. The runs lie beside it, each in the folder of its own identity."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def record(self) -> Path:
        return self.path / "sweep.json"

    @property
    def study(self) -> Path:
        """What a search has asked and been told, for all processes that share it."""
        return self.path / "study.journal"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def holders(self) -> Path:
        """A lock for each process that searches here."""
        return self.path / ".holders"

    def log(self, number: int) -> Path:
        """What a trial says that shares the machine with others."""
        return self.path / "trials" / f"{number}.log"

    def write(self, name: str, words: list[str], objectives: Any, trials: list[Trial]) -> None:
        """Write sweep.json, wholly or not at all."""
        found = [trial.to_json(self.path) for trial in trials]
        directions = {figure: direction.value for figure, direction in objectives.items()}
        head = {"name": name, "words": words, "objectives": directions}
        try:
            write_json(self.record, head | {"trials": found})
        except OSError as error:  # the next one says it again
            if not is_disk_full(error):
                raise
