"""What the operating system allows: files, shared memory, host memory, and the hub."""

import os
import resource
import shutil
from pathlib import Path

from llmtrain.doctor.line import Line, green, red, yellow
from llmtrain.hardware import GIB, host_memory_gib
from llmtrain.hub import answers, endpoint

FEWEST_FILES, ENOUGH_FILES = 256, 1024  # a rank opens its shards, libraries and a link to each peer
LEAST_SHARED_GIB = 1.0  # NCCL's buffers for GPUs that do not reach each other; docker gives 0.06
SHARED = Path("/dev/shm")
MIRROR = "https://hf-mirror.com"


def open_files(soft: int, hard: int) -> Line:
    """How many files a process may have open."""
    if soft >= ENOUGH_FILES:
        return green("open files", found=f"{soft:,} for each process")
    state = red if soft < FEWEST_FILES else yellow
    found = f"{soft:,} for each process, fewer than {ENOUGH_FILES:,}"
    if hard >= ENOUGH_FILES:
        setting = f"ulimit -n {hard}"
        return state("open files", found=found, remedy=setting, setting=setting)
    remedy = "raise nofile in /etc/security/limits.conf; in docker: --ulimit nofile=65536"
    return state("open files", found=found, remedy=remedy)


def open_files_here() -> Line:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in limits)
    return open_files(soft, hard)


def shared_memory(free_gib: float, num_gpus: int) -> Line:
    """Room in /dev/shm, through which NCCL passes what GPUs cannot hand each other."""
    found = f"{free_gib:.2f} GiB free in {SHARED}"
    if num_gpus > 1 and free_gib < LEAST_SHARED_GIB:
        remedy = "docker run --shm-size=16g, or --ipc=host; else mount -o remount,size=16g /dev/shm"
        return red(
            "shared memory", found=f"{found}, too little for {num_gpus} ranks", remedy=remedy
        )
    return green("shared memory", found=found)


def shared_memory_here(num_gpus: int) -> Line:
    free = shutil.disk_usage(SHARED).free if SHARED.exists() else 0
    return shared_memory(free / GIB, num_gpus)


def host_memory(limit_gib: float, total_gib: float, free_gib: float, swap_gib: float) -> Line:
    """Memory of the machine, a container's limit, and what is free of it now."""
    limit = f" (a container's limit; the machine has {total_gib:.1f})"
    swap = f"{swap_gib:.1f} GiB swap" if swap_gib else "no swap"
    found = f"{free_gib:.1f} of {limit_gib:.1f} GiB free"
    found += f"{limit if limit_gib < 0.99 * total_gib else ''}, {swap}"
    if free_gib < limit_gib / 2:
        remedy = "end what holds it (top, sorted by M): plans count on most of it"
        return yellow("host memory", found=found, remedy=remedy)
    return green("host memory", found=found)


def host_memory_here() -> Line:
    import psutil

    memory, limit = psutil.virtual_memory(), host_memory_gib()
    free = min(memory.available / GIB, limit)
    return host_memory(limit, memory.total / GIB, free, psutil.swap_memory().total / GIB)


def hub(endpoint: str, answers: bool, mirror_answers: bool) -> Line:
    """Whether models can be fetched by name."""
    if answers:
        return green("hub", found=f"{endpoint} answers")
    found = f"{endpoint} does not answer; only models and data by hub name need it"
    if mirror_answers:
        setting = f"export HF_ENDPOINT={MIRROR}"
        return yellow("hub", found=found, remedy=f"a mirror does: {setting}", setting=setting)
    return yellow("hub", found=found, remedy="copy a model's folder here: model.path=<folder>")


def hub_here() -> Line:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return green("hub", found="HF_HUB_OFFLINE is set: models by name come from the cache")
    is_there = answers(endpoint())
    return hub(endpoint(), is_there, not is_there and answers(MIRROR))
