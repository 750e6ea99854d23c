"""What a callback may do: look, print, and ask for the end of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.schema import Part

Record = Mapping[str, Any]


@dataclass
class Callback(Part):
    """Looks on from the first rank; what it prints goes to ``logs/rank_0.log``.

    A hook that returns a text asks for the end of the run, with that as the reason. All ranks then
    end after the step, as at the horizon: with a checkpoint, the final model and the closing
    evaluation. Settings that decide about that are ``learned`` fields; a callback that never asks
    for the end has ``unlearned`` ones only, its ``kind`` among them, and leaves the run the same.
    """

    def on_step(self, record: Record) -> str | None:
        """A training record of metrics.jsonl: one every ``train.log_every`` steps."""
        return None

    def on_eval(self, record: Record) -> str | None:
        """A record of an evaluation on the way."""
        return None

    def on_save(self, step: int, path: Path) -> str | None:
        """A checkpoint of a step lies at a path, whole; training may be some steps further."""
        return None

    def on_epoch_end(self, epoch: int) -> str | None:
        """All of the data was read, for the ``epoch``-th time."""
        return None

    def resume(self, records: Sequence[Record]) -> str | None:
        """Take up what was remembered, at a start or when the run went back to a checkpoint.

        All records so far are told again, so that what follows from them alone survives a kill. One
        that writes or sends should override this.
        """
        reasons = [getattr(self, hook_of(record))(record) for record in records]
        return next((reason for reason in reasons if reason), None)


def hook_of(record: Record) -> str:
    """The hook that a record is for."""
    return "on_eval" if "eval_loss" in record else "on_step"
