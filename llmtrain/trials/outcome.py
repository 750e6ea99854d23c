"""How a trial turned out, as its process and its run's folder say."""

import json

from llmtrain.errors import DONE, REFUSED, STOPPED, ConfigError, nearest
from llmtrain.trials.record import Trial

IN_QUEUE = ("planned", "queued", "running")  # what a run says whose job is still to come


def note_end(trial: Trial, code: int, asked: str | None) -> None:
    """Note what has become of a trial whose process ended with an exit code.

    ``asked`` is what it was to become when it was made to leave: pruned or stopped.
    """
    trial.state = state_after(trial, code, asked)
    if trial.state == "pruned" and trial.folder is not None:
        trial.folder.write_status("pruned", trial.folder.read_status().get("step", 0))
    if trial.state == "done":
        take_result(trial)
    elif trial.state in ("failed", "refused") and trial.error is None:
        trial.error = error_of(trial, code)


def state_after(trial: Trial, code: int, asked: str | None) -> str:
    """A trial's state after its process has ended."""
    assert trial.config is not None
    said = trial.folder.read_status().get("state") if trial.folder is not None else None
    if asked is not None and said != "done":
        return asked
    if code == DONE and trial.config.launcher.queues and said is not None:
        return str(said) if said not in IN_QUEUE or is_to_come(trial) else "failed"
    return {DONE: "done", STOPPED: "stopped", REFUSED: "refused"}.get(code, "failed")


def is_to_come(trial: Trial) -> bool:
    """Whether a trial's job is in the queue, or was not put there yet."""
    assert trial.config is not None and trial.folder is not None
    launcher = trial.config.launcher
    return bool(launcher.gathers or not launcher.submit or launcher.is_live(trial.folder))


def take_result(trial: Trial) -> None:
    """Read a run's summary for the figures of the objectives."""
    trial.state = "done"
    if trial.folder is None or trial.config is None or not trial.folder.summary.exists():
        return  # a rehearsal
    summary = json.loads(trial.folder.summary.read_text())
    names = trial.config.sweep.goals
    missing = [name for name in names if not isinstance(summary.get(name), int | float)]
    if missing:
        trial.state = "failed"
        known = [name for name, value in summary.items() if isinstance(value, int | float)]
        reason = "is no figure of summary.json"
        error = ConfigError("sweep.objectives", missing[0], reason, nearest(missing[0], known))
        trial.error = str(error)
        return
    trial.values = [float(summary[name]) for name in names]


def error_of(trial: Trial, code: int) -> str:
    """Why a trial failed whose process did not say it."""
    said = trial.folder.read_status().get("error") if trial.folder is not None else None
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return str(said or f"Its process {how}.")
