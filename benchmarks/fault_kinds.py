"""What is done to a run at a random instant, and models that read numbers that are none."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from llmtrain.folder import RunFolder

FULL = "fill the disk for some seconds"
LONGEST_FULL = 6.0
DISK = "192m"


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


def fill_disk(parent: psutil.Process, folder: RunFolder, chance: random.Random) -> None:
    """Leave no byte free for some seconds, in which training goes on."""
    filler = folder.path.parent / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    time.sleep(LONGEST_FULL * chance.random())
    filler.unlink()


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
    FULL: fill_disk,
}
DAMAGES = (truncate, flip_bit)


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A disk of its own at a path; False where this user may not mount one."""
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    is_mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def poison(model: Path, folder: RunFolder, num_steps: int, num_times: int) -> int:
    """Make a model's embedding NaN at tokens that are read in one step each, and never held out.

    ``folder`` is a run on the same data and in the same order. Returns how many steps go wrong.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tokens = tokens_of_one_step(folder, num_steps)[:num_times]
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][tokens] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return len(tokens)


def tokens_of_one_step(folder: RunFolder, num_steps: int) -> list[int]:
    """Tokens that one step alone reads, of the middle of the run, no two of the same step."""
    from llmtrain.config import load
    from llmtrain.data.order import step_sequences
    from llmtrain.data.sequences import open_sequences
    from llmtrain.data.shards import Manifest
    from llmtrain.plan import Plan

    config, plan = load(folder.config), Plan.load(folder.plan)
    manifest = Manifest.load(Path(json.loads(folder.manifest.read_text())["folder"]))
    sequences, held_out = (
        open_sequences(manifest, split, plan.seq_len) for split in ("train", "held_out")
    )
    steps_of: dict[int, set[int]] = {}
    for step in range(2 * num_steps):  # going back leads past the last one
        indices = step_sequences(config.seed, step, plan.global_batch, len(sequences))
        for token in set(sequences.batch(list(indices))["input_ids"].ravel().tolist()):
            steps_of.setdefault(token, set()).add(step)
    seen = set(held_out.batch(list(range(len(held_out))))["input_ids"].ravel().tolist())
    middle = range(num_steps // 6, num_steps * 5 // 6)
    found = {
        next(iter(steps)): token
        for token, steps in steps_of.items()
        if len(steps) == 1 and next(iter(steps)) in middle and token not in seen
    }
    return [found[step] for step in sorted(found)]
