"""A run that begins at a checkpoint of another, or at an older one of its own, in a new folder."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.checkpoint import read_state
from llmtrain.checkpoint.store import copy, fault_of
from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.folder import RunFolder, write_json
from llmtrain.plan import Plan

SAME = {  # of a plan, and how a user says it
    "num_parameters": "parameters",
    "num_trainable_parameters": "trained parameters",
    "optimizer": "as its optimizer",
}
WAYS = ("auto", "never")


class Parent(NamedTuple):
    """The run and the step that a branch begins at."""

    folder: RunFolder
    step: int

    @property
    def checkpoint(self) -> Path:
        return self.folder.checkpoint(self.step)


def parent_of(config: RunConfig, plan: Plan) -> Parent | None:
    """What ``resume`` names: a step of this run, a run folder or a checkpoint; None for neither.

    Raises ConfigError where there is no such checkpoint, or it is of another model.
    """
    if config.resume in WAYS:
        return None
    own = RunFolder(Path(config.output_root) / plan.name)
    before = begun(own, config.resume)
    if before is not None:
        return before
    is_step = config.resume.isdecimal()
    parent = at_step(own, int(config.resume)) if is_step else at_path(config.resume)
    refuse_other_model(parent, plan)
    return parent


def begun(own: RunFolder, resume: str) -> Parent | None:
    """The parent of a branch that this command began before, whatever became of that one since."""
    path = Path(resume).expanduser()
    if not resume.isdecimal() and not RunFolder(path).exists():
        return None
    pattern = resume if resume.isdecimal() else f"{origin_of(RunFolder(path))}_*"
    for branch in sorted(own.path.parent.glob(f"{own.path.name}-from_{pattern}")):
        if RunFolder(branch).exists():
            found = json.loads(RunFolder(branch).parent.read_text())
            return Parent(RunFolder(found["run"]), found["step"])
    return None


def at_path(resume: str) -> Parent:
    """A run folder, at its newest checkpoint, or a checkpoint."""
    path = Path(resume).expanduser().absolute()
    if (path / "state.json").is_file():
        return of_run(RunFolder(path.parent.parent), int(read_state(path)["step"]), resume, path)
    steps = RunFolder(path).checkpoint_steps()
    if steps:
        return of_run(RunFolder(path), steps[-1], resume)
    if (path / "config.json").is_file():
        remedy = f"to start from its weights: model=pretrained model.path={resume}"
        raise ConfigError("resume", resume, "is a model without training state", remedy)
    remedy = "give auto, never, a step of this run, a run folder or a checkpoint"
    raise ConfigError("resume", resume, "holds no checkpoint", remedy)


def of_run(folder: RunFolder, step: int, resume: str, path: Path | None = None) -> Parent:
    """Raises ConfigError for a checkpoint that lies in no run's folder."""
    parent = Parent(folder, step)
    if not folder.plan.exists() or path not in (None, parent.checkpoint):
        reason, remedy = "lies in no run's folder", "give outputs/<run>/checkpoints/step_<n>"
        raise ConfigError("resume", resume, reason, remedy)
    return parent


def at_step(folder: RunFolder, step: int) -> Parent:
    steps = folder.checkpoint_steps()
    if step not in steps:
        kept = ", ".join(map(str, steps)) or "none"
        reason, remedy = "is no checkpoint of this run", f"kept are: {kept}"
        raise ConfigError("resume", step, reason, remedy)
    return Parent(folder, step)


def name_of(plan: Plan, config: RunConfig, parent: Parent) -> str:
    """The branch's folder: that of the run, with where it comes from."""
    if config.resume.isdecimal():
        return f"{plan.name}-from_{parent.step}"
    return f"{plan.name}-from_{origin_of(parent.folder)}_{parent.step}"


def origin_of(folder: RunFolder) -> str:
    """What tells a run of another place in a branch's name."""
    return hashlib.sha256(str(folder.path.absolute()).encode()).hexdigest()[:6]


def begin(folder: RunFolder, parent: Parent) -> None:
    """Fill a new folder from its parent: the checkpoint, the records up to it, and its name.

    Raises ConfigError for a checkpoint that is broken.
    """
    fault = fault_of(parent.checkpoint)
    if fault is not None:
        raise ConfigError("resume", parent.checkpoint, f"is broken: it {fault}", "take another")
    for source, target in (
        (parent.folder.metrics, folder.metrics),
        (parent.folder.samples, folder.samples),
    ):
        if source.exists():
            shutil.copyfile(source, target)
    write_json(folder.parent, {"run": str(parent.folder.path), "step": parent.step})
    folder.checkpoints.mkdir(exist_ok=True)
    copy(parent.checkpoint, folder.checkpoint(parent.step))
    print(f"A branch of {parent.folder.path} from step {parent.step}: {folder.path}")


def refuse_other_model(parent: Parent, plan: Plan) -> None:
    """Raise ConfigError where the parent's state would not fill this run's."""
    before: dict[str, Any] = json.loads(parent.folder.plan.read_text())
    for name, words in SAME.items():
        there, here = before.get(name), getattr(plan, name)
        if there != here:
            reason = f"has {there} {words}, and this run {here}"
            remedy = "give the parent's model and optimizer, or start from its final/ model"
            raise ConfigError("resume", parent.checkpoint, reason, remedy)
