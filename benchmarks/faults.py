"""Runs that are killed, halted and damaged at random, beside one that was left in peace.

    python -m benchmarks.faults [--faults 200] [--minutes 60] [--seed 0]

A small run on two processes is started again after each fault until it is done, and then the next
one with other random instants. Half of the faults wait for the middle of a save. Each run has to
end with the losses of the undisturbed one, each step in its records once, and no older checkpoint
changed. Writes results/<date>-<machine>/faults.json and .md.
"""

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from llmtrain.errors import DONE, FAILED
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.hardware import cpu_name
from llmtrain.metrics import read_records

HERE = Path(__file__).parent
WORDS = [
    "model.config.hidden_size=64",
    "model.config.head_dim=32",
    "model.config.num_hidden_layers=2",
    "data.tokenizer.vocab_size=512",
    "train.seq_len=32",
    "train.global_batch=4",
    "train.log_every=1",
    "train.eval_every=1000",
    "train.max_steps=300",
    "checkpoint.every=10",
    "checkpoint.keep=4",
    "hardware=cpux2",
    "launcher.hang_floor_seconds=3",
]
STAGES = (0, 1, 2, 3)
LONGEST_SECONDS = 180  # of a start without a fault
LONGEST_WAIT = 12.0  # for an instant, from the first step on


def ranks_of(parent: psutil.Process) -> list[psutil.Process]:
    """The rank processes, in order of their ids."""
    found = [each for each in parent.children(recursive=True) if "llmtrain.train" in words_of(each)]
    return sorted(found, key=lambda each: each.pid)


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill_rank(parent: psutil.Process, folder: RunFolder, chance: random.Random) -> None:
    chance.choice(ranks_of(parent)).kill()


def kill_parent(parent: psutil.Process, folder: RunFolder, chance: random.Random) -> None:
    parent.kill()


def kill_all(parent: psutil.Process, folder: RunFolder, chance: random.Random) -> None:
    for each in [*ranks_of(parent), parent]:
        each.kill()


def halt_rank(parent: psutil.Process, folder: RunFolder, chance: random.Random) -> None:
    chance.choice(ranks_of(parent)).suspend()


def stop(parent: psutil.Process, folder: RunFolder, chance: random.Random) -> None:
    parent.send_signal(chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)))


def truncate(parent: psutil.Process, folder: RunFolder, chance: random.Random) -> None:
    kill_all(parent, folder, chance)
    file = newest_file(folder, chance)
    if file is not None:
        os.truncate(file, chance.randrange(file.stat().st_size))


def flip_bit(parent: psutil.Process, folder: RunFolder, chance: random.Random) -> None:
    kill_all(parent, folder, chance)
    file = newest_file(folder, chance)
    if file is not None:
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)


def newest_file(folder: RunFolder, chance: random.Random) -> Path | None:
    """A file of tensors of the newest checkpoint; None before there is one."""
    steps = folder.checkpoint_steps()
    if not steps:
        return None
    return chance.choice(sorted(folder.checkpoint(steps[-1]).glob("*.safetensors")))


Fault = Callable[[psutil.Process, RunFolder, random.Random], None]
FAULTS: dict[str, Fault] = {
    "kill -9 a rank": kill_rank,
    "kill -9 the parent": kill_parent,
    "kill -9 all": kill_all,
    "halt a rank (SIGSTOP)": halt_rank,
    "SIGTERM, SIGINT or SIGUSR2": stop,
    "kill all, truncate the newest checkpoint": truncate,
    "kill all, flip a bit in the newest checkpoint": flip_bit,
}


@dataclass
class Harness:
    """Faults until there were enough, and what became of each run."""

    options: argparse.Namespace
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    in_saves: int = 0
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_faults(self) -> int:
        return sum(self.counts.values())

    def is_over(self, end: float) -> bool:
        return self.num_faults >= self.options.faults or time.monotonic() > end

    def disturb(self, name: str, stage: int, expected: list[Any], end: float) -> None:
        """One run with faults until it is done."""
        num_before, num_starts = self.num_faults, 0
        while True:
            num_starts += 1
            process = start(self.options.work, name, stage)
            while not list(self.options.work.glob(f"{name}-*")) and process.poll() is None:
                time.sleep(0.02)
            folder = folder_of(self.options.work, name)
            if not self.is_over(end) and self.wait_for_instant(process, folder):
                self.strike(process, folder)
            code = ended(process)
            if folder.read_status().get("state") == "done":
                break
            if num_starts > 60:
                raise RuntimeError(f"{name} does not end; its last exit code was {code}")
        is_same = records_of(folder) == expected
        faults = self.num_faults - num_before
        self.runs.append({"run": name, "stage": stage, "faults": faults, "is_same": is_same})
        print(f"{name}: {faults} faults in {num_starts} starts, the same: {is_same}", flush=True)

    def wait_for_instant(self, process: subprocess.Popen[bytes], folder: RunFolder) -> bool:
        """Wait for a random instant, or from there on for a save; False where the run ended."""
        first = step_of(folder)
        while process.poll() is None and step_of(folder) == first:
            time.sleep(0.02)
        end = time.monotonic() + self.chance.random() ** 2 * LONGEST_WAIT
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if self.chance.random() < 0.5:
            while process.poll() is None and not list(folder.checkpoints.glob(".step_*")):
                time.sleep(0.0005)
            self.in_saves += process.poll() is None
        return process.poll() is None

    def strike(self, process: subprocess.Popen[bytes], folder: RunFolder) -> None:
        name = self.chance.choice(list(FAULTS))
        try:
            FAULTS[name](psutil.Process(process.pid), folder, self.chance)
        except (psutil.Error, IndexError):
            return  # it had just ended
        self.counts[name] += 1


def start(work: Path, name: str, stage: int) -> "subprocess.Popen[bytes]":
    words = [*WORDS, f"name={name}", f"zero.stage={stage}", f"output_root={work}"]
    with open(work / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "llmtrain.run", *words], stdout=log, stderr=log
        )


def ended(process: "subprocess.Popen[bytes]") -> int:
    """The exit code, when neither the process nor a rank of it is there any more."""
    code = process.wait(LONGEST_SECONDS)
    time.sleep(0.3)
    return code


def folder_of(work: Path, name: str) -> RunFolder:
    return RunFolder(next(work.glob(f"{name}-*"), work / name))


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
    lines = [
        "# Faults",
        "",
        f"`python -m benchmarks.faults`, {what}.",
        f"{harness.num_faults} faults, {harness.in_saves} of them in the middle of a save. A run "
        "is the same if step, loss, learning rate, gradient norm and held-out loss of each of its "
        "records are those of a run that was left in peace, bit for bit.",
        "",
        "| fault | times |",
        "| --- | --: |",
        *(f"| {name} | {count} |" for name, count in sorted(harness.counts.items())),
        "",
        "| run | ZeRO stage | faults | the same |",
        "| --- | --: | --: | --- |",
        *(
            f"| {run['run']} | {run['stage']} | {run['faults']} | {run['is_same']} |"
            for run in harness.runs
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    assert __doc__ is not None
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("outputs/faults"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.work = options.work.absolute() / time.strftime("%Y%m%d-%H%M%S")
    options.work.mkdir(parents=True)
    end = time.monotonic() + 60 * options.minutes
    harness, expected = Harness(options, random.Random(options.seed)), {}
    number = 0
    while not harness.is_over(end):
        stage = STAGES[number % len(STAGES)]
        if stage not in expected:
            name = f"peace{stage}"
            assert ended(start(options.work, name, stage)) == DONE
            expected[stage] = records_of(folder_of(options.work, name))
        harness.disturb(f"run{number}", stage, expected[stage], end)
        number += 1
        save(harness, options.out)
    return DONE if all(run["is_same"] for run in harness.runs) else FAILED


def save(harness: Harness, out: Path) -> None:
    """What is known so far."""
    place = out / f"{date.today()}-{platform.machine()}" / "faults"
    what = f"{date.today()} on {cpu_name()}, seed {harness.options.seed}"
    values = {"machine": cpu_name(), "counts": dict(harness.counts), "in_saves": harness.in_saves}
    write_json(place.with_suffix(".json"), values | {"runs": harness.runs})
    write_text(place.with_suffix(".md"), page(harness, what))


if __name__ == "__main__":
    sys.exit(main())
