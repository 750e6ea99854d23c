"""Checkpoints as files: written with their hashes, verified, set aside, thinned out, mirrored."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.folder import RunFolder, publish, write_json

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
CHUNK_BYTES = 2**24
# https://github.com/huggingface/safetensors#format
DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def write_tensors(path: Path, tensors: dict[str, "Tensor"]) -> dict[str, Any]:
    """Write a safetensors file and have it on disk; its ``bytes`` and ``sha256``.

    The library's own ``save_file`` makes a second copy of everything, and its file would have to be
    read again for the hash.
    """
    import torch

    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for part in (header(tensors), *(bytes_of(each, torch) for each in tensors.values())):
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
            num_bytes += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def write_part(path: Path, files: dict[str, dict[str, "Tensor"]], rank: int) -> None:
    """Write a rank's files, and beside them what the manifest will say of them."""
    path.mkdir(parents=True, exist_ok=True)
    named = {f"{name}_{rank}.safetensors": tensors for name, tensors in files.items()}
    entries = {name: write_tensors(path / name, tensors) for name, tensors in named.items()}
    write_json(path / f"part_{rank}.json", entries)


def write_manifest(path: Path, head: dict[str, Any]) -> None:
    """Gather what all ranks say of their files; what lies there otherwise is read for it."""
    files: dict[str, Any] = {}
    for part in path.glob("part_*.json"):
        files |= json.loads(part.read_text())
        part.unlink()
    files |= {each.name: entry_of(each) for each in path.iterdir() if each.name not in files}
    write_json(path / MANIFEST, head | {"files": dict(sorted(files.items()))})


def header(tensors: dict[str, "Tensor"]) -> memoryview:
    """The file's beginning: names, dtypes, shapes and places, as JSON with its length before."""
    entries, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        kind, shape = DTYPES[str(tensor.dtype)], list(tensor.shape)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def bytes_of(tensor: "Tensor", torch: Any) -> memoryview:
    """A tensor's memory as it is."""
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was written."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"has no {MANIFEST} that can be read"
    with ThreadPoolExecutor() as pool:
        faults = pool.map(lambda item: fault_of_file(path / item[0], item[1]), files.items())
        return next(filter(None, faults), None)


def fault_of_file(path: Path, written: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != written["bytes"]:
            return f"{path.name} has {size:,} bytes of {written['bytes']:,}"
        if entry_of(path) != written:
            return f"{path.name} has other content than was written"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def newest_good(folder: RunFolder, mirror: Path | None, tell: Callable[[str], None]) -> int:
    """The step of the newest checkpoint that is whole, 0 for none; broken ones are set aside.

    Where none is whole the mirror's are looked at, and the newest one is copied back.
    """
    for step in reversed(folder.checkpoint_steps()):
        path = folder.checkpoint(step)
        fault = fault_of(path)
        if fault is None:
            return step
        aside = set_aside(path)
        tell(f"The checkpoint of step {step} is broken ({fault}); it was moved to {aside}.")
    return 0 if mirror is None else brought_back(folder, mirror, tell)


def brought_back(folder: RunFolder, mirror: Path, tell: Callable[[str], None]) -> int:
    """Copy the newest whole checkpoint of the mirror into the run folder; its step, or 0."""
    for step in reversed(steps_in(mirror)):
        if fault_of(mirror / f"step_{step}") is None:
            copy(mirror / f"step_{step}", folder.checkpoint(step))
            tell(f"The checkpoint of step {step} was copied back from {mirror}.")
            return step
    return 0


def set_aside(path: Path) -> Path:
    """Keep a broken checkpoint, the latest alone, under a name by which nobody resumes."""
    for older in path.parent.glob("broken_*"):
        shutil.rmtree(older, ignore_errors=True)
    numbered = (path.with_name(f"broken_{path.name}_{number}") for number in count(1))
    aside = next(each for each in numbered if not each.exists())
    path.rename(aside)
    return aside


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, oldest first."""
    found = folder.glob("step_*")
    return sorted(int(path.name[5:]) for path in found if path.name[5:].isdigit())


def copy(path: Path, target: Path) -> None:
    """Copy a checkpoint so that it is there wholly or not at all."""
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(path, temporary)
        publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def thin_out(folder: Path, keep: int, keep_every: int | None, best: int | None) -> None:
    """Delete what is neither among the newest ``keep``, nor a milestone, nor the best."""
    steps = steps_in(folder)
    for step in steps[:-keep]:
        is_milestone = keep_every is not None and step % keep_every == 0
        if not is_milestone and step != best:
            shutil.rmtree(folder / f"step_{step}")


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save left, before ranks write again."""
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def mirror_of(mirror: str, folder: RunFolder) -> Path:
    """Where a run's checkpoints are copied to."""
    return Path(mirror).expanduser().absolute() / folder.path.name


def free_bytes(path: Path) -> int:
    """Room on the disk of a folder that may not be there yet."""
    existing: Iterable[Path] = (each for each in (path, *path.parents) if each.exists())
    return shutil.disk_usage(next(iter(existing))).free
