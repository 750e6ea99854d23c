"""The sweep: seats are filled, trials watched and ended ones told, until none is left."""

import hashlib
import json
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from launchers.local import stop_requests
from llmtrain.compose.points import Space, config_or_refusal, space_of
from llmtrain.config import RunConfig
from llmtrain.errors import DONE, FAILED, STOPPED, ConfigError
from llmtrain.on_finish import Afterwards
from llmtrain.report import write_report
from llmtrain.sweep.search import Search
from llmtrain.trials.grid import GridTrials
from llmtrain.trials.outcome import note_end, take_result
from llmtrain.trials.record import SweepFolder, Trial, run_folder
from llmtrain.trials.running import Running, has_job
from llmtrain.trials.search import SearchTrials
from llmtrain.trials.seats import Seat, seats
from llmtrain.trials.show import Board
from llmtrain.trials.trainer import Run, Trainer, heat

POLL_SECONDS = 0.5
WRITE_SECONDS = 1.0


class Trials(Protocol):
    """Where trials come from."""

    @property
    def trials(self) -> list[Trial]: ...
    def next(self) -> Trial | None: ...
    def ended(self, trial: Trial) -> None: ...
    def is_hopeless(self, trial: Trial) -> bool: ...
    def close(self) -> None: ...


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
        if dimension.name.split(".")[0] in ("sweep", "launcher", "output_root", "resume"):
            reason, remedy = "is one for all points", "give one value"
            raise ConfigError(dimension.name, "several values", reason, remedy)
    if config.resume not in ("auto", "never"):
        reason, remedy = "begins one run at a checkpoint", "leave it out of a multirun"
        raise ConfigError("resume", config.resume, reason, remedy)
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
        self.asked, self.launcher, self.first = first.sweep, first.launcher, first
        self.run, self.afterwards = run, afterwards
        num_seats = self.asked.num_parallel
        parts = 1 if self.launcher.queues else num_seats  # of this machine
        self.free = seats(parts, first.hardware) * (num_seats // parts)
        self.follows_queue = bool(self.asked.searches or num_seats > 1)
        # All folders are filled before any is queued, so that jobs may be an array.
        self.gathers = self.launcher.queues and self.launcher.submit and not self.follows_queue
        self.running: list[Running] = []
        self.waiting: list[Trial] = []  # for another process, which trains them
        self.is_prepared = False
        self.board = Board(self.asked, folder, trials)
        self.written_at = 0.0

    def run_all(self) -> int:
        """Run what is left of the sweep; returns the exit code."""
        heat(self.first)
        try:
            with stop_requests() as requests, self.board.shown():
                while self.fill(requests.is_one) or self.running:
                    self.look()
                    if requests.is_one:
                        self.stop(requests.is_urgent)
        finally:
            self.end_all()
        if self.gathers and not requests.is_one:
            self.queue_gathered()
        self.write()
        self.board.show_all()
        self.report()
        return self.code(requests.is_one)

    def fill(self, is_stopping: bool) -> bool:
        """Put trials on free seats; whether there may be more to come."""
        while self.free and not is_stopping:
            if self.running and not self.is_prepared:
                return True
            trial = self.next_trial()
            if trial is None:
                return bool(self.waiting)
            self.start(trial)
        return not is_stopping

    def next_trial(self) -> Trial | None:
        """One that nobody trains; None where there is none now."""
        for waiting in self.waiting:
            if not self.is_taken(waiting):
                self.waiting.remove(waiting)
                return waiting
        while (trial := self.trials.next()) is not None and self.is_taken(trial):
            self.board.show_wait(trial)
            self.waiting.append(trial)
        return trial

    def is_taken(self, trial: Trial) -> bool:
        """Whether some process trains in the trial's folder, perhaps of a sweep that was killed."""
        if trial.config is None or self.launcher.queues:  # the queue knows
            return False
        folder = run_folder(trial.config)
        names = [each.trial.folder.path for each in self.running if each.trial.folder is not None]
        return folder.path in names or folder.is_locked()

    def start(self, trial: Trial) -> None:
        """Start a trial, unless it is over: it was done before, or is a twin."""
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
        trial.config.tracker.join(self.folder.path.name)
        trial.config.launcher.gathers = self.gathers
        trainer = None if has_job(trial) else self.trainer(trial, self.free[0])
        self.running.append(Running(trial, self.free.pop(0), trainer, self.follows_queue))
        self.write()

    def trainer(self, trial: Trial, seat: Seat) -> Trainer:
        assert trial.config is not None
        has_terminal = self.asked.num_parallel == 1
        log = None if has_terminal else self.folder.log(trial.number)
        own = [word for word in trial.words if not word.startswith("sweep")]
        return Trainer(self.run, own, trial.config, seat, log)

    def look(self) -> None:
        """Wait a little, then see what the trials do."""
        living = [each.trainer for each in self.running if each.trainer and not each.is_gone]
        wait([trainer.sentinel for trainer in living], POLL_SECONDS)
        if not living:
            time.sleep(POLL_SECONDS)
        for each in list(self.running):
            has_left = each.has_left()  # before its last words are heard
            each.hear(self.afterwards)
            self.is_prepared = self.is_prepared or each.is_prepared
            if has_left:
                self.conclude(each)
            elif each.is_prepared and self.trials.is_hopeless(each.trial):
                each.leave("pruned")
        self.board.refresh([each.trial for each in self.running])

    def stop(self, is_urgent: bool) -> None:
        """Have all trials save and leave, or leave as they are; jobs of a cluster go on."""
        for each in list(self.running):
            if each.is_gone and each.is_queued():
                self.running.remove(each)
            elif is_urgent:
                each.kill()
            elif not each.is_gone:
                each.leave("stopped")

    def end_all(self) -> None:
        """Leave no process behind where this one ends by an error of its own."""
        for each in self.running:
            if each.trainer is not None and not each.is_gone:
                each.leave("stopped")
                each.trainer.process.join()

    def conclude(self, running: Running) -> None:
        """Note how a trial ended, and free its seat."""
        self.running.remove(running)
        self.free.append(running.seat)
        asked = "stopped" if running.is_lost else running.asked
        note_end(running.trial, running.code or DONE, asked)
        self.end(running.trial)

    def end(self, trial: Trial) -> None:
        """Tell all who want to know that a trial has ended."""
        self.trials.ended(trial)
        self.board.show_end(trial)
        self.write(least_seconds=WRITE_SECONDS)

    def write(self, least_seconds: float = 0.0) -> None:
        """Write sweep.json, unless that was done a moment ago."""
        if time.monotonic() - self.written_at >= least_seconds:
            self.folder.write(self.asked.name, self.words, self.asked.goals, self.trials.trials)
            self.written_at = time.monotonic()

    def queue_gathered(self) -> None:
        """Queue what waits for it."""
        gathered = [trial for trial in self.trials.trials if trial.state == "planned"]
        folders = [trial.folder for trial in gathered if trial.folder is not None]
        self.launcher.queue_gathered(folders, self.folder.path)
        for trial in gathered:
            trial.state = "queued"

    def report(self) -> None:
        """Write the page that compares the trials, where there is something to compare."""
        if not any(trial.state == "done" for trial in self.trials.trials):
            return
        try:
            self.board.say(f"the report {write_report([self.folder.path], self.folder.report)}")
        except ConfigError as error:  # a package is missing: the runs are there all the same
            self.board.say(f"no report: {error}")

    def code(self, was_stopped: bool) -> int:
        """The exit code that says what has become of the trials."""
        states = {trial.state for trial in self.trials.trials}
        if was_stopped or "stopped" in states:
            self.board.say("The same command continues the sweep.")
            return STOPPED
        return FAILED if states & {"failed", "refused"} else DONE
