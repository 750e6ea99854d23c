"""The process that sends a run's records to its tracker: started beside the ranks, and ended."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf

from launchers.local import code_path
from llmtrain.folder import RunFolder
from llmtrain.tracker.base import Tracker

CLOSE_SECONDS = 10.0  # that the end of a run waits for its tracker
REST_SECONDS = 600.0  # where nothing else is left to do
DEATH_SECONDS = 5.0


class Tracking:
    """``with`` this, a run's records go to its tracker, if it has one.

    Nothing that happens to a tracker reaches the run. At the end it is waited for a while, and a
    warning says if it lacks something.
    """

    def __init__(
        self, tracker: Tracker, folder: RunFolder, patience_seconds: float = CLOSE_SECONDS
    ) -> None:
        self.tracker = tracker
        self.folder = folder
        self.patience_seconds = patience_seconds
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Tracking":
        if self.tracker.is_on:
            self.folder.logs.mkdir(exist_ok=True)
            self.folder.tracker_warning.unlink(missing_ok=True)
            self.process = self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None:
            state = self.folder.read_status().get("state")
            self.end(self.process, state if state in ("done", "failed") else "stopped")

    def start(self) -> "subprocess.Popen[bytes]":
        """The sender, in a session of its own, which Ctrl+C does not reach."""
        values: Any = OmegaConf.to_container(OmegaConf.structured(self.tracker), enum_to_str=True)
        command = [sys.executable, "-u", "-m", "llmtrain.sender", str(self.folder.path)]
        own = {"LLMTRAIN_PARENT": str(os.getpid()), "PYTHONPATH": code_path()}
        with self.folder.tracker_log.open("ab") as log:
            return subprocess.Popen(
                [*command, json.dumps(values)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | own,
                start_new_session=True,
            )

    def end(self, process: "subprocess.Popen[bytes]", state: str) -> None:
        """Say how the run ended, and wait for the last records to be taken, but not for long."""
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.communicate(state.encode(), self.patience_seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(DEATH_SECONDS)
        if process.returncode != 0:
            log = os.path.relpath(self.folder.tracker_log)
            what = f"tracker={self.tracker.kind} lacks the last of this run"
            print(f"warning: {what}; the same command sends it. Log: {log}")


def send_rest(tracker: Tracker, folder: RunFolder) -> None:
    """Send what a tracker has not been told of a run that is done."""
    note = folder.tracker_note
    told = json.loads(note.read_text()) if note.exists() else {}
    if told.get(tracker.kind, {}).get("state") != "done":
        with Tracking(tracker, folder, REST_SECONDS):
            pass
