"""Questions that are put to a process of their own: what crashes or hangs there does so alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class NoAnswer(Exception):
    """A process that was asked and failed: the last line that it wrote."""


def ask(question: str, *words: str, seconds: float = 120) -> Any:
    """The answer of :mod:`llmtrain.doctor.answer`. Raises NoAnswer where that process fails."""
    ended = run("llmtrain.doctor.answer", question, *words, seconds=seconds)
    if ended.returncode != 0:
        raise NoAnswer(reason(ended.returncode, ended.stderr))
    return json.loads(ended.stdout.splitlines()[-1])


def run(module: str, *words: str, seconds: float) -> "subprocess.CompletedProcess[str]":
    """One of our modules, run to its end, from any folder. Raises NoAnswer where it hangs."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "200"}
    command = [sys.executable, "-m", module, *words]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"no answer in {seconds:.0f} s") from None


def reason(code: int, output: str) -> str:
    """Why a process failed: the signal that killed it, or the last line that it wrote."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit code {code}"
