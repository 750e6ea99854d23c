"""The trials of a search: Optuna is asked for each and told how it turned out."""

import socket
import warnings
from math import prod
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from filelock import FileLock, Timeout

from llmtrain.compose.points import Dimension, Space, config_or_refusal
from llmtrain.errors import ConfigError
from llmtrain.folder import RunFolder
from llmtrain.metrics import read_records
from llmtrain.sweep.search import Pruner, Sampler, Search
from llmtrain.trials.grid import number_in, trial_of
from llmtrain.trials.record import SweepFolder, Trial, run_folder

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

DIGITS = 4  # of a number that is searched: enough to learn from, and short enough to read

SAMPLERS = {
    Sampler.tpe: "TPESampler",
    Sampler.random: "RandomSampler",
    Sampler.grid: "GridSampler",
    Sampler.cmaes: "CmaEsSampler",
    Sampler.qmc: "QMCSampler",
    Sampler.gp: "GPSampler",
    Sampler.nsgaii: "NSGAIISampler",
}
PRUNERS = {
    Pruner.none: "NopPruner",
    Pruner.median: "MedianPruner",
    Pruner.halving: "SuccessiveHalvingPruner",
    Pruner.hyperband: "HyperbandPruner",
}
NEEDS = {Sampler.cmaes: "cmaes", Sampler.qmc: "scipy", Sampler.gp: "scipy"}


class SearchTrials:
    """Gives trials as the study asks for them, those first that a sweep left when it was killed.

    The study is a journal on disk, which several processes may share: each holds a lock of its own
    for as long as it lives, and a trial names the lock of the process that runs it.
    """

    def __init__(self, asked: Search, space: Space, folder: SweepFolder) -> None:
        check(asked, space)
        self.asked, self.space, self.folder = asked, space, folder
        self.num_trials = min(asked.num_trials, num_points(asked, space))
        self.holder = folder.holders / f"{socket.gethostname()}-{uuid4().hex}"
        folder.holders.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.holder)
        self.lock.acquire()
        self.study = open_study(asked, folder)
        self.own: dict[int, Trial] = {}
        self.asked_of: dict[int, optuna.Trial] = {}
        self.sizes: dict[int, int] = {}  # of the records that were read
        self.orphans = self.take_orphans()

    @property
    def trials(self) -> list[Trial]:
        """All of the study, those of other processes and earlier commands too."""
        found = self.study.get_trials(deepcopy=False)
        return [self.own.get(each.number) or self.noted(each) for each in found]

    def next(self) -> Trial | None:
        """One that was left, or a new one; None when there are as many as were asked for."""
        asked = self.next_asked()
        if asked is None:
            return None
        trial = self.composed(asked.number, asked.params)
        if trial.config is not None:
            asked.set_user_attr("run", str(run_folder(trial.config).path))
        frozen = self.study.get_trials(deepcopy=False)[asked.number]
        trial.steps_told = set(frozen.intermediate_values)
        self.own[trial.number], self.asked_of[trial.number] = trial, asked
        return trial

    def next_asked(self) -> "optuna.Trial | None":
        """The study's next trial, which is this process's alone."""
        with FileLock(self.folder.holders / "asking"):
            if self.orphans:
                return self.orphans.pop(0)
            num_before = len(self.study.get_trials(deepcopy=False))
            if num_before < self.num_trials:
                self.study.sampler = sampler_of(self.asked, self.space, num_before)
                asked = self.study.ask(distributions(self.space))
                asked.set_user_attr("holder", self.holder.name)
                return asked
        self.orphans = self.take_orphans()  # of a process that has died since
        return self.orphans.pop(0) if self.orphans else None

    def composed(self, number: int, params: dict[str, Any]) -> Trial:
        """A trial of what the study suggests."""
        keys = {dimension.name: dimension.key for dimension in self.space.dimensions}
        varied = [f"{keys[name]}={written(value)}" for name, value in params.items()]
        words = [*self.space.fixed, *varied]
        return trial_of(number, words, varied, config_or_refusal(words))

    def noted(self, frozen: "optuna.trial.FrozenTrial") -> Trial:
        """A trial as the study knows it."""
        known = frozen.user_attrs
        params = {name: number_in(written(value)) for name, value in frozen.params.items()}
        trial = Trial(frozen.number, [], params, state=known.get("state", "running"))
        trial.folder = RunFolder(known["run"]) if "run" in known else None
        trial.error = known.get("error")
        trial.values = frozen.values if trial.state == "done" else None
        return trial

    def ended(self, trial: Trial) -> None:
        """Tell the study; a trial that was stopped is asked for again."""
        from optuna.trial import TrialState

        asked = self.asked_of[trial.number]
        if not trial.is_over:
            return
        asked.set_user_attr("state", trial.state)
        asked.set_user_attr("error", trial.error)
        if trial.state == "done":
            self.study.tell(asked, trial.values, skip_if_finished=True)
        elif trial.state == "pruned" or (trial.steps_told and self.asked.prunes):
            # What diverged is known to be bad, too.
            self.study.tell(asked, state=TrialState.PRUNED, skip_if_finished=True)
        else:
            self.study.tell(asked, state=TrialState.FAIL, skip_if_finished=True)

    def is_hopeless(self, trial: Trial) -> bool:
        """Report new records to the study, and hear whether the trial falls behind."""
        if not self.asked.prunes or trial.folder is None:
            return False
        asked, figure = self.asked_of[trial.number], next(iter(self.asked.goals))
        if not self.has_grown(trial):
            return False
        new = [
            record
            for record in read_records(trial.folder.metrics)
            if record.get(figure) is not None and record["step"] not in trial.steps_told
        ]
        for record in new:
            asked.report(record[figure], record["step"])
            trial.steps_told.add(record["step"])
        return bool(new) and asked.should_prune()

    def has_grown(self, trial: Trial) -> bool:
        """Whether a run has records that were not read yet."""
        assert trial.folder is not None
        metrics = trial.folder.metrics
        size = metrics.stat().st_size if metrics.exists() else 0
        before, self.sizes[trial.number] = self.sizes.get(trial.number, 0), size
        return size != before

    def take_orphans(self) -> list["optuna.Trial"]:
        """The trials whose process is gone; only one process may take them."""
        import optuna
        from optuna.trial import TrialState

        with FileLock(self.folder.holders / "asking"):
            running = self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
            left = [each for each in running if not self.is_held(each.user_attrs.get("holder"))]
            found = [optuna.Trial(self.study, each._trial_id) for each in left]
            for each in found:
                each.set_user_attr("holder", self.holder.name)
                for name, distribution in distributions(self.space).items():
                    each._suggest(name, distribution)  # it may have died in the middle of these
        return found

    def is_held(self, holder: str | None) -> bool:
        """Whether the process lives that runs a trial."""
        if holder is None or holder == self.holder.name:
            return holder is not None
        try:
            with FileLock(self.folder.holders / holder, timeout=0):
                return False
        except Timeout:
            return True

    def close(self) -> None:
        self.lock.release()


def open_study(asked: Search, folder: SweepFolder) -> "optuna.Study":
    """The study in a sweep's folder, made where there is none."""
    import optuna

    from llmtrain.trials.journal import journal

    study = optuna.create_study(
        study_name=asked.name,
        storage=journal(folder.study),
        load_if_exists=True,
        directions=[direction.value for direction in asked.goals.values()],
        pruner=pruner_of(asked),
    )
    # What a grid's sampler calls at its end, and what fails where trials are asked for and told.
    study.stop = lambda: None  # type: ignore[method-assign]
    return study


def check(asked: Search, space: Space) -> None:
    """Raise ConfigError for what cannot be searched, before anything is written.

    That is a package which is not installed, an option that a sampler or pruner does not have, or a
    range that is none.
    """
    require(asked)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    distributions(space)
    sampler_of(asked, space, num_before=0)
    pruner_of(asked)


def require(asked: Search) -> None:
    """Raise ConfigError for a package that is missing."""
    from importlib.util import find_spec

    for name in ("optuna", NEEDS.get(asked.sampler)):
        if name is not None and find_spec(name) is None:
            remedy = f"run: pip install -c constraints.txt {name}"
            raise ConfigError("sweep.sampler", asked.sampler.value, f"needs {name}", remedy)


def sampler_of(asked: Search, space: Space, num_before: int) -> Any:
    """The sampler of one trial, which draws what no other of the search draws.

    A grid, and a sequence that fills the space evenly, are one for all trials.
    """
    import optuna

    number = 0 if asked.sampler in (Sampler.grid, Sampler.qmc) else num_before
    (seed,) = np.random.SeedSequence([asked.seed, number]).generate_state(1)
    options = {"seed": int(seed)} | asked.sampler_options
    if asked.sampler is Sampler.grid:
        options["search_space"] = {each.name: values_of(each) for each in space.dimensions}
    return made(optuna.samplers, SAMPLERS[asked.sampler], "sampler", options)


def pruner_of(asked: Search) -> Any:
    import optuna

    return made(optuna.pruners, PRUNERS[asked.pruner], "pruner", asked.pruner_options)


def values_of(dimension: Dimension) -> list[Any]:
    """All values of a dimension. Raises ConfigError for one without an end of them."""
    from optuna.distributions import CategoricalDistribution

    if dimension.choices is None:
        reason, remedy = "knows no intervals", "give values, or take another sampler"
        raise ConfigError("sweep.sampler", "grid", reason, remedy)
    is_text = isinstance(distribution_of(dimension), CategoricalDistribution)
    kind = str if is_text else int if dimension.is_whole else float
    return [kind(choice) for choice in dimension.choices]


def num_points(asked: Search, space: Space) -> int:
    """How many different points a sampler that repeats none can give."""
    if asked.sampler is not Sampler.grid:
        return asked.num_trials
    return prod(len(values_of(each)) for each in space.dimensions)


def made(module: Any, name: str, what: str, options: dict[str, Any]) -> Any:
    """An Optuna object of some options."""
    try:
        return getattr(module, name)(**options)
    except (TypeError, ValueError) as error:
        reason = f"is not what {name} takes ({error})"
        raise ConfigError(f"sweep.{what}_options", options, reason, "see Optuna's") from None


def distributions(space: Space) -> dict[str, "BaseDistribution"]:
    return {each.name: distribution_of(each) for each in space.dimensions}


def distribution_of(dimension: Dimension) -> "BaseDistribution":
    """A dimension in Optuna's words."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    low, high, step = dimension.low, dimension.high, dimension.step
    if low is None or high is None:
        assert dimension.choices is not None
        return CategoricalDistribution(dimension.choices)
    is_log = dimension.is_log
    try:
        if dimension.is_whole:
            return IntDistribution(int(low), int(high), is_log, 1 if is_log else int(step or 1))
        return FloatDistribution(low, high, is_log, None if is_log else step)
    except ValueError as error:
        value = f"{low:g} to {high:g}"
        remedy = "see the values of sweep.params"
        raise ConfigError(dimension.name, value, f"is no range: {error}", remedy) from None


def written(value: Any) -> str:
    """A value on a command line."""
    return repr(float(f"{value:.{DIGITS}g}")) if isinstance(value, float) else str(value)
