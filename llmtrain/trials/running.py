"""A trial that has begun: in a process of this machine, and then perhaps in a cluster's queue."""

import time
from dataclasses import dataclass

from llmtrain.folder import RunFolder
from llmtrain.on_finish import Afterwards, OnFinish
from llmtrain.trials.record import Trial
from llmtrain.trials.seats import Seat
from llmtrain.trials.trainer import LOST, Trainer

QUEUE_SECONDS = 2.0  # between two looks at a cluster's queue


@dataclass
class Running:
    """A trial on a seat. Without a trainer another command has queued its job."""

    trial: Trial
    seat: Seat
    trainer: Trainer | None
    follows_queue: bool
    is_prepared: bool = False  # what trials share was measured and tokenised
    asked: str | None = None  # what it is to become if it does not end by itself
    before: OnFinish | None = None  # what was to follow the sweep without it
    looked_at: float = 0.0
    has_job: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether no process of this machine runs it."""
        return self.trainer is None or self.trainer.code is not None

    @property
    def code(self) -> int | None:
        """The exit code of its process, if that is known."""
        code = self.trainer.code if self.trainer is not None else None
        return None if code == LOST else code

    @property
    def is_lost(self) -> bool:
        """Whether its process cannot be heard any more, and perhaps lives."""
        return self.trainer is not None and self.trainer.code == LOST

    def has_left(self) -> bool:
        """Whether it has ended, as far as this command stays with it."""
        if not self.is_gone:
            return False
        self.is_prepared = True
        return not (self.follows_queue and self.is_queued())

    def is_queued(self) -> bool:
        """Whether its job waits or runs; asked of the cluster from time to time."""
        if time.monotonic() - self.looked_at > QUEUE_SECONDS:
            self.has_job, self.looked_at = has_job(self.trial), time.monotonic()
        return self.has_job

    def hear(self, afterwards: Afterwards) -> None:
        """Take note of what its process says, and of what is to follow the sweep."""
        assert self.trial.config is not None
        for what, value in self.trainer.messages() if self.trainer else ():
            if what == "error":
                self.trial.error = value
            elif what == "prepared":
                afterwards.latest = self.before
            else:
                self.before, afterwards.latest = afterwards.latest, self.trial.config.on_finish
            if what == "training":
                self.is_prepared, self.trial.folder = True, RunFolder(value)

    def leave(self, asked: str) -> None:
        """Have it save and leave, to become what is asked."""
        if self.asked is not None:
            return
        self.asked = asked
        if self.trainer is not None and not self.is_gone:
            self.trainer.stop()
        elif self.trial.config is not None and self.trial.folder is not None:
            self.trial.config.launcher.cancel(self.trial.folder)

    def kill(self) -> None:
        if self.trainer is not None and not self.is_gone:
            self.asked = self.asked or "stopped"
            self.trainer.kill()


def has_job(trial: Trial) -> bool:
    """Whether a trial's job is in a cluster's queue."""
    launcher = trial.config.launcher if trial.config is not None else None
    return bool(launcher and launcher.queues and trial.folder and launcher.is_live(trial.folder))
