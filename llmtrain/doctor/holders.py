"""Who holds memory on the GPUs."""

import os
from typing import NamedTuple

from llmtrain.doctor.line import Line, green, yellow
from llmtrain.hardware import Gpu

LEAST_GIB = 1.0  # less than this is the driver's and a display's


class Holder(NamedTuple):
    """A process on a GPU. ``user`` is empty where the process cannot be seen from here."""

    uuid: str
    pid: int
    command: str
    gib: float | None
    user: str
    is_ours: bool

    def __str__(self) -> str:
        gib = f", {self.gib:.1f} GiB" if self.gib is not None else ""
        whose = "yours" if self.is_ours else f"of {self.user or 'another container or user'}"
        return f"pid {self.pid} {self.command} ({whose}{gib})"


def holders_of(rows: list[list[str]]) -> list[Holder]:
    """The processes of ``--query-compute-apps=gpu_uuid,pid,used_memory,process_name``."""
    return [holder(row) for row in rows if len(row) >= 4 and row[1].isdigit()]


def holder(row: list[str]) -> Holder:
    """One process; a name may have commas, and memory may be [N/A]."""
    uuid, pid, mib = row[0], int(row[1]), row[2]
    command, user, is_ours = identity(pid)
    gib = float(mib) / 1024 if mib.replace(".", "").isdigit() else None
    return Holder(uuid, pid, command or ",".join(row[3:]), gib, user, is_ours)


def identity(pid: int) -> tuple[str, str, bool]:
    """The command line of a process, whose it is, and whether that is this user."""
    import psutil

    try:
        process = psutil.Process(pid)
        is_ours = process.uids().real == os.getuid()
        return " ".join(process.cmdline())[:80], process.username(), is_ours
    except psutil.Error:
        return "", "", False


def memory_lines(gpus: list[Gpu], used_gib: dict[str, float], holders: list[Holder]) -> list[Line]:
    """One line for all cards that are free, and one for each that somebody holds."""
    busy = [gpu for gpu in gpus if is_held(gpu, used_gib, holders)]
    free = [gpu for gpu in gpus if gpu not in busy]
    lines = [held_line(gpu, used_gib.get(gpu.uuid, 0.0), holders) for gpu in busy]
    if free:
        numbers = ", ".join(gpu.number for gpu in free)
        gib = min(gpu.memory_gib - used_gib.get(gpu.uuid, 0.0) for gpu in free)
        lines.append(
            green("GPU memory", found=f"GPU {numbers}: {gib:.1f} GiB free, held by nobody")
        )
    return lines


def is_held(gpu: Gpu, used_gib: dict[str, float], holders: list[Holder]) -> bool:
    is_named = any(holder.uuid == gpu.uuid for holder in holders)
    return is_named or used_gib.get(gpu.uuid, 0.0) > LEAST_GIB


def held_line(gpu: Gpu, used_gib: float, holders: list[Holder]) -> Line:
    """What holds a card, and how to be rid of it."""
    here = [holder for holder in holders if holder.uuid == gpu.uuid]
    who = "; ".join(map(str, here)) or "something that cannot be seen from here"
    found = f"{used_gib:.1f} of {gpu.memory_gib:.1f} GiB are held by {who}"
    ours = [str(holder.pid) for holder in here if holder.is_ours]
    remedy = f"wait, or train on other GPUs: export CUDA_VISIBLE_DEVICES=<all but {gpu.number}>"
    if ours:
        remedy = f"if it was left behind: kill {' '.join(ours)} (--fix asks for each)"
    return yellow(f"GPU {gpu.number}", found=found, remedy=remedy)
