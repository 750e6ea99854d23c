"""The fault harness in short: `python -m benchmarks.faults` does the same for an hour."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, Command

STEPS = 120


def test_a_run_under_faults_ends_as_one_that_was_left_in_peace(command: Command) -> None:
    """Killed, halted, damaged and without disk, over data that make some steps NaN."""
    words = ["--faults", "4", "--steps", str(STEPS), "--kind", "stage2_skipped"]
    places = ["--work", str(command.folder / "work"), "--out", str(command.folder / "out")]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *words, *places, "--minutes", "12"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=command.environment | {"LLMTRAIN_CACHE": str(command.cache)},
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (table,) = command.folder.glob("out/*/faults.json")
    assert_all_well(table)


def assert_all_well(table: Path) -> None:
    found = json.loads(table.read_text())
    assert sum(found["counts"].values()) > 2
    assert found["counts"]["a NaN in the loss"] > 0
    for run in found["runs"]:
        assert run["is_same"]
        assert not run["went_too_far_back"]
        assert not run["touched"]
        assert not run["tracebacks"]
        assert not run["died_of_full_disk"]
