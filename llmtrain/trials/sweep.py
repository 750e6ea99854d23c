"""The sweep: seats are filled, trials watched and ended ones told, until none is left."""

import hashlib
import json
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from launchers.local import stop_requests
from llmtrain.compose.points import Space, config_or_refusal, space_of
from llmtrain.config import RunConfig
from llmtrain.errors import DONE, FAILED, STOPPED, ConfigError
from llmtrain.folder import RunFolder
from llmtrain.on_finish import Afterwards, OnFinish
from llmtrain.report import write_report
from llmtrain.sweep.search import Search
from llmtrain.trials.grid import GridTrials
from llmtrain.trials.outcome import note_end, take_result
from llmtrain.trials.record import SweepFolder, Trial, run_folder
from llmtrain.trials.search import SearchTrials
from llmtrain.trials.seats import Seat, seats
from llmtrain.trials.show import Board
from llmtrain.trials.trainer import Run, Trainer, heat

POLL_SECONDS = 0.5


class Trials(Protocol):
    """Where trials come from."""

    @property
    def trials(self) -> list[Trial]: ...
    def next(self) -> Trial | None: ...
    def ended(self, trial: Trial) -> None: ...
    def is_hopeless(self, trial: Trial) -> bool: ...
    def close(self) -> None: ...


@dataclass
class Running:
    """A trial on a seat: in a process of this machine, and then perhaps in a cluster's queue."""

    trial: Trial
    seat: Seat
    trainer: Trainer | None
    is_pruned: bool = False
    is_stopping: bool = False
    before: OnFinish | None = None  # what was to follow the sweep without it

    @property
    def is_gone(self) -> bool:
        """Whether no process of this machine runs it."""
        return self.trainer is None or self.trainer.code is not None


def sweep(words: list[str], run: Run, afterwards: Afterwards) -> int:
    """Run the points of a multirun, and return the exit code.

    The sweep has a folder of its own beside those of its runs. Raises ConfigError for what cannot
    be swept.
    """
    first, space = first_point(words)
    folder = SweepFolder(Path(first.output_root) / name_of(first, space))
    if isinstance(first.sweep, Search):
        trials: Trials = SearchTrials(first.sweep, space, folder)
    else:
        trials = GridTrials(words, space)
    try:
        return Sweep(words, first, folder, trials, run, afterwards).run_all()
    finally:
        trials.close()


def first_point(words: list[str]) -> tuple[RunConfig, Space]:
    """The space of a multirun, and the config of its first point, which speaks for the sweep."""
    space = space_of(words)
    config = config_of_first(space)
    if isinstance(config.sweep, Search):
        params = [f"{key}={value}" for key, value in config.sweep.params.items()]
        space = space_of([*params, *words])
        config = config_of_first(space)
    for dimension in space.dimensions:
        if dimension.name.split(".")[0] == "sweep" or dimension.name == "output_root":
            reason, remedy = "is one for all points", "give one value"
            raise ConfigError(dimension.name, "several values", reason, remedy)
    if not space.dimensions:
        remedy = "give KEY=A,B, or sweep=NAME with a space"
        raise ConfigError("-m", " ".join(words), "varies nothing", remedy)
    return config, space


def config_of_first(space: Space) -> RunConfig:
    """The config of the first point. Raises ConfigError where that is no experiment."""
    firsts = [f"{each.key}={first_value(each)}" for each in space.dimensions]
    config = config_or_refusal([*space.fixed, *firsts])
    if isinstance(config, ConfigError):
        raise config
    config.sweep.check()
    return config


def first_value(dimension: Any) -> str:
    if dimension.choices is not None:
        return str(dimension.choices[0])
    return str(int(dimension.low) if dimension.is_whole else dimension.low)


def name_of(first: RunConfig, space: Space) -> str:
    """A sweep's identity is what is searched and how, not for how long or on what machine."""
    varied = [vars(each) for each in space.dimensions]
    how: list[Any] = []
    if isinstance(first.sweep, Search):
        asked = first.sweep
        how = [asked.sampler.value, asked.sampler_options, asked.seed]
        how += [asked.pruner.value, asked.pruner_options]
    how += [{name: value.value for name, value in first.sweep.goals.items()}]
    text = json.dumps([first.identity, varied, how], default=str, sort_keys=True)
    return f"{first.sweep.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Sweep:
    """Fills the seats of this machine with trials."""

    def __init__(
        self,
        words: list[str],
        first: RunConfig,
        folder: SweepFolder,
        trials: Trials,
        run: Run,
        afterwards: Afterwards,
    ) -> None:
        self.words, self.folder, self.trials = words, folder, trials
        self.asked = first.sweep
        self.first, self.run, self.afterwards = first, run, afterwards
        num_seats = self.asked.num_parallel
        parts = 1 if first.launcher.queues else num_seats  # of this machine
        self.free = seats(parts, first.hardware) * (num_seats // parts)
        self.running: list[Running] = []
        self.next_trial: Trial | None = None
        self.has_begun = False  # one trial trains: what all share is measured and tokenised
        self.board = Board(self.asked, folder, trials)

    @property
    def is_alone(self) -> bool:
        """Whether a trial has the machine, and the terminal, for itself."""
        return self.asked.num_parallel == 1

    def run_all(self) -> int:
        """Run what is left of the sweep; returns the exit code."""
        heat(self.first)
        with stop_requests() as requests, self.board:
            while self.fill(requests.is_one) or self.running:
                self.look()
                if requests.is_one:
                    self.stop(requests.is_urgent)
        self.queue_gathered()
        self.write()
        self.board.show_all()
        self.report()
        return self.code(requests.is_one)

    def report(self) -> None:
        """Write the page that compares the trials, where there is something to compare."""
        if not any(trial.state == "done" for trial in self.trials.trials):
            return
        try:
            self.board.say(f"the report {write_report([self.folder.path], self.folder.report)}")
        except ConfigError as error:  # a package is missing: the runs are there all the same
            self.board.say(f"no report: {error}")

    @property
    def gathers(self) -> bool:
        """Whether all folders are filled before any is queued, so that jobs may be an array."""
        launcher = self.first.launcher
        return bool(launcher.queues and launcher.submit and not self.follows_queue)

    def queue_gathered(self) -> None:
        """Queue what waits for it."""
        gathered = [trial for trial in self.trials.trials if trial.state == "planned"]
        folders = [trial.folder for trial in gathered if trial.folder is not None]
        if self.gathers and folders:
            self.first.launcher.queue_gathered(folders, self.folder.path)
            for trial in gathered:
                trial.state = "queued"

    def code(self, was_stopped: bool) -> int:
        if was_stopped:
            self.board.say("The same command continues the sweep.")
            return STOPPED
        is_bad = any(trial.state in ("failed", "refused") for trial in self.trials.trials)
        return FAILED if is_bad else DONE

    def fill(self, is_stopping: bool) -> bool:
        """Put trials on free seats; whether there may be more to come."""
        while self.free and not is_stopping:
            if self.running and not self.has_begun:
                return True
            self.next_trial = self.next_trial or self.trials.next()
            if self.next_trial is None:
                return False
            if self.is_taken(self.next_trial):
                self.board.show_wait(self.next_trial)
                return True
            self.start(self.next_trial)
            self.next_trial = None
        return not is_stopping

    def is_taken(self, trial: Trial) -> bool:
        """Whether some process trains in the trial's folder, perhaps of a sweep that was killed."""
        if trial.config is None:
            return False
        if self.first.launcher.queues:
            return False  # the queue knows
        names = [each.trial.folder and each.trial.folder.path.name for each in self.running]
        return trial.config.run_name in names or run_folder(trial.config).is_locked()

    def start(self, trial: Trial) -> None:
        """Start a trial, unless it is over: it was done before, or has no config."""
        self.board.show_start(trial)
        if trial.config is None:
            self.end(trial)
            return
        trial.folder = run_folder(trial.config)
        if trial.config.resume == "auto" and trial.folder.read_status().get("state") == "done":
            take_result(trial)
            self.end(trial)
            return
        trial.state = "running"
        trainer = None if self.is_queued(trial) else self.trainer(trial, self.free[0])
        self.running.append(Running(trial, self.free.pop(0), trainer))
        self.write()

    def trainer(self, trial: Trial, seat: Seat) -> Trainer:
        assert trial.config is not None
        if self.gathers:
            trial.config.launcher.gathers = True
        log = None if self.is_alone else self.folder.log(trial.number)
        own = [word for word in trial.words if not word.startswith("sweep")]
        return Trainer(self.run, own, trial.config, seat, log)

    def look(self) -> None:
        """Wait a little, then see what the trials do."""
        living = [each.trainer for each in self.running if each.trainer and not each.is_gone]
        wait([trainer.sentinel for trainer in living], POLL_SECONDS)
        if not living:
            time.sleep(POLL_SECONDS)
        for each in list(self.running):
            self.hear(each)
            if each.is_gone and not (self.follows_queue and self.is_queued(each.trial)):
                self.conclude(each)
            elif not each.is_pruned and self.trials.is_hopeless(each.trial):
                each.is_pruned = True
                self.cancel(each)
        self.board.refresh([each.trial for each in self.running])

    def hear(self, running: Running) -> None:
        """Take note of what a trial's process says."""
        assert running.trial.config is not None
        on_finish = running.trial.config.on_finish
        for what, value in running.trainer.messages() if running.trainer else ():
            if what == "error":
                running.trial.error = value
            elif what == "prepared":
                self.afterwards.latest = running.before
            else:
                running.before, self.afterwards.latest = self.afterwards.latest, on_finish
            if what == "training":
                self.has_begun, running.trial.folder = True, RunFolder(value)

    @property
    def follows_queue(self) -> bool:
        """Whether a trial keeps its seat while its job is in a cluster's queue."""
        return bool(self.asked.searches or self.asked.num_parallel > 1)

    def is_queued(self, trial: Trial) -> bool:
        """Whether a trial's job waits or runs on a cluster."""
        launcher = self.first.launcher
        return bool(launcher.queues and trial.folder and launcher.is_live(trial.folder))

    def cancel(self, running: Running) -> None:
        """Have a trial save and leave."""
        if running.trainer is not None and not running.is_gone:
            running.trainer.stop()
        elif running.trial.folder is not None:
            self.first.launcher.cancel(running.trial.folder)

    def stop(self, is_urgent: bool) -> None:
        """Have all trials save and leave, or leave as they are; jobs on a cluster go on."""
        for each in list(self.running):
            if each.trainer is None or each.is_gone:
                self.running.remove(each)
            elif is_urgent:
                each.trainer.kill()
            elif not each.is_stopping:
                each.is_stopping = True
                each.trainer.stop()

    def conclude(self, running: Running) -> None:
        """Note how a trial ended, and free its seat."""
        self.running.remove(running)
        self.free.append(running.seat)
        self.has_begun = True
        code = running.trainer.code if running.trainer else None
        note_end(running.trial, code or DONE, self.state_asked_for(running))
        self.end(running.trial)

    def state_asked_for(self, running: Running) -> str | None:
        """What a trial is to be if it has not ended by itself."""
        if running.is_pruned:
            return "pruned"
        return "stopped" if running.is_stopping else None

    def end(self, trial: Trial) -> None:
        """Tell all who want to know that a trial has ended."""
        self.trials.ended(trial)
        self.board.show_end(trial)
        self.write()

    def write(self) -> None:
        self.folder.write(self.asked.name, self.words, self.asked.goals, self.trials.trials)
