"""Runs that are killed, halted, starved and damaged at random, beside those left in peace.

    python -m benchmarks.faults [--faults 200] [--minutes 90] [--seed 0] [--kind stage2_good]

A small run on two processes goes on after each fault, by itself or started again, until it is
done, and then the next one with other random instants. Half of the faults wait for the middle of a
save. Two thirds of the runs read steps whose loss is NaN, and skip them or go back. Each run has to
end with the losses of the undisturbed one, each step in its records once, from the newest whole
checkpoint at each start, and no older checkpoint changed. Writes
results/<date>-<machine>/faults.json and .md. A disk is filled where a small one may be mounted: run
it as root.
"""

import argparse
import json
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.fault_kinds import DAMAGES, FAULTS, FULL, poison, small_disk
from llmtrain.errors import DONE, FAILED
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.hardware import cpu_name
from llmtrain.metrics import read_records

HERE = Path(__file__).parent
NUM_BAD = 3  # steps whose loss is NaN, in a run over data with such
WORDS = [
    "data.tokenizer.vocab_size=512",
    "train.seq_len=32",
    "train.global_batch=4",
    "train.log_every=1",
    "train.eval_every=1000",
    "optimizer=adamw",
    "checkpoint.every=10",
    "checkpoint.keep=4",
    "hardware=cpux2",
    "launcher.hang_floor_seconds=3",
    "launcher.max_restarts=3",
]
MODEL = [
    "model.config.hidden_size=64",
    "model.config.head_dim=32",
    "model.config.num_hidden_layers=2",
    "model.config.tie_word_embeddings=false",
]
SKIPPING = "on_divergence.max_skipped_steps=10"
GOING_BACK = ["on_divergence.max_skipped_steps=1", "on_divergence.max_rollbacks=10"]
LONGEST_SECONDS = 180  # of a start without a fault
MOST_STARTS = 200  # of a run: faults that come faster than checkpoints leave no progress
LONGEST_WAIT = 4.0  # for an instant, from the first step on


class Kind(NamedTuple):
    """What is trained, and whether its data makes steps go wrong."""

    stage: int
    numbers: str = "good"  # or "skipped" or "gone back from"

    @property
    def name(self) -> str:
        return f"stage{self.stage}_{self.numbers.replace(' ', '_')}"


KINDS = [
    *(Kind(stage) for stage in range(4)),
    *(Kind(stage, "skipped") for stage in range(4)),
    *(Kind(stage, "gone back from") for stage in range(4)),
]


@dataclass
class Harness:
    """Faults until there were enough, and what became of each run."""

    options: argparse.Namespace
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    in_saves: int = 0
    runs: list[dict[str, Any]] = field(default_factory=list)
    expected: dict[Kind, list[Any]] = field(default_factory=dict)

    @property
    def num_faults(self) -> int:
        return sum(self.counts.values())

    def is_over(self, end: float) -> bool:
        return self.num_faults >= self.options.faults or time.monotonic() > end

    def go_on(self, out: Path) -> None:
        """Add to what an earlier call found."""
        found = json.loads(place_in(out).with_suffix(".json").read_text())
        self.counts.update(found["counts"])
        self.in_saves, self.runs = found["in_saves"], found["runs"]

    def start(self, name: str, kind: Kind) -> "subprocess.Popen[bytes]":
        words = [f"zero.stage={kind.stage}", f"name={name}"]
        if kind.numbers == "good":
            words += MODEL
        else:
            skips = [SKIPPING] if kind.numbers == "skipped" else GOING_BACK
            words += ["model=pretrained", f"model.path={self.poisoned[0]}", *skips]
        steps = f"train.max_steps={self.options.steps}"
        return start(self.options.work, self.place(name), steps, *words)

    @cached_property
    def poisoned(self) -> tuple[Path, int]:
        """A model that reads NaN in some steps of its data, and how many these are."""
        work = self.options.work
        assert ended(start(work, work / "seedling", *MODEL, "train.max_steps=1")) == DONE
        model = work / "poisoned"
        shutil.copytree(folder_in(work / "seedling").final, model)
        words = ["model=pretrained", f"model.path={model}", "train.max_steps=1"]
        assert ended(start(work, work / "sprout", *words)) == DONE
        folder = folder_in(work / "sprout")
        return model, poison(model, folder, self.options.steps, NUM_BAD)

    def num_bad(self, kind: Kind) -> int:
        """How many steps of a run of this kind go wrong."""
        return 0 if kind.numbers == "good" else self.poisoned[1]

    def place(self, name: str) -> Path:
        return self.options.work / name

    def records(self, kind: Kind) -> list[Any]:
        """Those of a run of this kind that was left in peace."""
        if kind not in self.expected:
            name = f"peace_{kind.name}"
            assert ended(self.start(name, kind)) == DONE, f"see {name}.log"
            folder = folder_in(self.place(name))
            self.expected[kind] = records_of(folder)
            assert folder.read_status()["skipped_steps"] == self.num_bad(kind)
        return self.expected[kind]

    def disturb(self, name: str, kind: Kind, end: float) -> None:
        """One run with faults until it is done, on a disk of its own that can be full."""
        expected = self.records(kind)
        with small_disk(self.place(name)) as is_small:
            run = Disturbed(self, name, kind, is_small)
            run.to_its_end(end)
            is_same = records_of(run.folder) == expected
        self.counts["a NaN in the loss"] += self.num_bad(kind)
        row = {"run": name, "stage": kind.stage, "steps_that_went_wrong": kind.numbers}
        row |= {"faults": run.num_faults, "starts": run.num_starts, "is_same": is_same}
        row |= {"went_too_far_back": run.too_far, "touched": run.touched}
        self.runs.append(row | {"tracebacks": run.tracebacks, "died_of_full_disk": run.died})
        print(self.runs[-1], flush=True)


@dataclass
class Disturbed:
    """A run under faults, and what a fault must not change."""

    harness: Harness
    name: str
    kind: Kind
    is_small: bool  # whether its disk may be filled
    num_faults: int = 0
    num_starts: int = 0
    too_far: int = 0  # starts that did not continue from the newest whole checkpoint
    died: int = 0  # of a full disk
    tracebacks: int = 0  # that a user was shown
    touched: int = 0  # files of older checkpoints that were changed
    files: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    promised: int = 0  # the step that the next start may not go behind

    @property
    def folder(self) -> RunFolder:
        return folder_in(self.harness.place(self.name))

    def to_its_end(self, end: float) -> None:
        place = self.harness.place(self.name)
        while True:
            self.num_starts += 1
            promised, said_before = self.promised, len(self.said())
            process = self.harness.start(self.name, self.kind)
            while not list(place.glob("*-*")) and process.poll() is None:
                time.sleep(0.02)
            while not self.harness.is_over(end) and self.wait_for_instant(process):
                self.strike(process)
            code = ended(process)
            self.look_back()
            self.too_far += resumed_from(self.said()[said_before:]) < promised
            self.tracebacks = self.said().count("Traceback")
            if self.folder.read_status().get("state") == "done":
                return
            if self.num_starts > MOST_STARTS:
                raise RuntimeError(f"{self.name} does not end; its last exit code was {code}")

    def wait_for_instant(self, process: "subprocess.Popen[bytes]") -> bool:
        """Wait for a random instant, or from there on for a save; False where the run ended."""
        first, chance = step_of(self.folder), self.harness.chance
        last = time.monotonic() + LONGEST_SECONDS
        while process.poll() is None and step_of(self.folder) == first:
            if time.monotonic() > last:
                raise RuntimeError(f"{self.name} stands still at step {first}")
            time.sleep(0.02)
        end = time.monotonic() + chance.random() ** 2 * LONGEST_WAIT
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if chance.random() < 0.5:
            while process.poll() is None and not list(self.folder.checkpoints.glob(".step_*")):
                time.sleep(0.0005)
            self.harness.in_saves += process.poll() is None
        return process.poll() is None

    def strike(self, process: "subprocess.Popen[bytes]") -> None:
        chance = self.harness.chance
        name = chance.choice([name for name in FAULTS if self.is_small or name != FULL])
        self.look_back()
        steps = self.folder.checkpoint_steps()
        self.files = self.files_of(steps)
        whole = steps[:-1] if FAULTS[name] in DAMAGES else steps
        if self.kind.numbers != "gone back from":  # there the checkpoints after it are dropped
            self.promised = max(whole, default=0)
        num_restarts = self.folder.read_status().get("restarts", 0)
        try:
            FAULTS[name](psutil.Process(process.pid), self.folder, chance)
        except (psutil.Error, IndexError):
            return  # it had just ended
        self.harness.counts[name] += 1
        self.num_faults += 1
        if name == FULL:
            self.died += process.poll() not in (None, DONE)
            self.died += self.folder.read_status().get("restarts", 0) - num_restarts

    def files_of(self, steps: list[int]) -> dict[Path, tuple[int, ...]]:
        """The files of the checkpoints but the newest, which a fault may damage."""
        found = {}
        for path in (
            path for step in steps[:-1] for path in self.folder.checkpoint(step).glob("*")
        ):
            with suppress(FileNotFoundError):  # it is just being thinned out
                found[path] = state_of(path)
        return found

    def look_back(self) -> None:
        """Compare what is there now with what was before the last fault."""
        for path, state in self.files.items():
            with suppress(FileNotFoundError):
                self.touched += state_of(path) != state
        self.files = {}

    def said(self) -> str:
        """What its starts have printed."""
        log = self.harness.place(self.name).with_suffix(".log")
        return log.read_text() if log.exists() else ""


def resumed_from(said: str) -> int:
    """The step from which a start continued, by what it printed."""
    found = re.search(r"Continuing from step (\d+)", said)
    return int(found[1]) if found else 0


def state_of(path: Path) -> tuple[int, ...]:
    seen = path.stat()
    return seen.st_ino, seen.st_size, seen.st_mtime_ns


def start(work: Path, place: Path, *words: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "llmtrain.run", *WORDS, *words, f"output_root={place}"]
    with open(work / f"{place.name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def ended(process: "subprocess.Popen[bytes]") -> int:
    """The exit code, when neither the process nor a rank of it is there any more."""
    code = process.wait(LONGEST_SECONDS)
    time.sleep(0.3)
    return code


def folder_in(place: Path) -> RunFolder:
    """The one run's folder; a path that is not there before it has begun."""
    return RunFolder(next(place.glob("*-*"), place / "none"))


def step_of(folder: RunFolder) -> int:
    try:
        return int(folder.read_status().get("step", 0))
    except (OSError, ValueError):
        return 0


def records_of(folder: RunFolder) -> list[Any]:
    """What was learned: step, loss and rate of each record, in order."""
    names = ("step", "loss", "lr", "grad_norm", "eval_loss")
    return [[each.get(name) for name in names] for each in read_records(folder.metrics)]


def page(harness: Harness, what: str) -> str:
    columns = ["run", "stage", "steps_that_went_wrong", "faults", "starts", "is_same"]
    columns += ["went_too_far_back", "touched", "tracebacks", "died_of_full_disk"]
    num_faults = harness.num_faults
    lines = [
        "# Faults",
        "",
        f"`python -m benchmarks.faults`, {what}.",
        f"{num_faults} faults, {harness.in_saves} of them in the middle of a save. A run "
        "is the same if step, loss, learning rate, gradient norm and held-out loss of each of its "
        "records are those of a run that was left in peace, bit for bit. It went too far back if a "
        "start of the command did not continue from the newest whole checkpoint (which is not "
        "known, and 0 written, where steps are gone back from); touched are files of older "
        "checkpoints that were changed. NaNs are counted once a run, however often it met them.",
        "",
        "| fault | times |",
        "| --- | --: |",
        *(f"| {name} | {count} |" for name, count in sorted(harness.counts.items())),
        "",
        f"| {' | '.join(column.replace('_', ' ') for column in columns)} |",
        "|" + " --- |" * len(columns),
        *(f"| {' | '.join(str(run[column]) for column in columns)} |" for run in harness.runs),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    assert __doc__ is not None
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="of each run")
    kinds = [kind.name for kind in KINDS]
    parser.add_argument("--kind", choices=kinds, metavar="KIND", help="only this, say stage2_good")
    parser.add_argument("--add", action="store_true", help="to the table of an earlier call today")
    parser.add_argument("--work", type=Path, default=Path("outputs/faults"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.work = options.work.absolute() / time.strftime("%Y%m%d-%H%M%S")
    options.work.mkdir(parents=True)
    end = time.monotonic() + 60 * options.minutes
    harness = Harness(options, random.Random(options.seed))
    if options.add:
        harness.go_on(options.out)
    chosen = [kind for kind in KINDS if options.kind in (None, kind.name)]
    for number in count(len(harness.runs)):
        if harness.is_over(end):
            break
        kind = chosen[number % len(chosen)]
        harness.disturb(f"run{number}", kind, end)
        save(harness, options.out)
    return DONE if all(map(is_well, harness.runs)) else FAILED


def is_well(run: dict[str, Any]) -> bool:
    bad = ("went_too_far_back", "touched", "tracebacks", "died_of_full_disk")
    return run["is_same"] and not any(run[name] for name in bad)


def place_in(out: Path) -> Path:
    return out / f"{date.today()}-{platform.machine()}" / "faults"


def save(harness: Harness, out: Path) -> None:
    """What is known so far."""
    place = place_in(out)
    what = f"{date.today()} on {cpu_name()}, seed {harness.options.seed}"
    values = {"machine": cpu_name(), "counts": dict(harness.counts), "in_saves": harness.in_saves}
    write_json(place.with_suffix(".json"), values | {"runs": harness.runs})
    write_text(place.with_suffix(".md"), page(harness, what))


if __name__ == "__main__":
    sys.exit(main())
