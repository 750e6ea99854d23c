"""Slices of a corpus worked on by several processes; the bytes are those of one alone."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llmtrain.data.corpus import Slice
from llmtrain.data.tokenising import Advance, Tokenising
from llmtrain.errors import ConfigError
from llmtrain.hardware import num_cores
from llmtrain.ranks import die_with_parent

AHEAD = 4  # slices for each worker that are handed out before they are asked for

Work = Callable[[Tokenising, Slice], Path]

_own: dict[str, Tokenising] = {}  # a worker's, given once


def tokenise_all(
    job: Tokenising, slices: Sequence[Slice], num_workers: int | None, advance: Advance
) -> list[Path]:
    """The folder of each slice's shards, in their order.

    A slice that was tokenised before is not read again. ``num_workers`` is the number of
    processes, by default one a core; with one slice, or one of them, it is this process, whose
    tokenizer uses all cores. The first error in the order of the slices is raised.
    """
    if min(num_workers or num_cores(), len(slices)) <= 1:
        return [job.tokenised(slice, advance) for slice in slices]
    return spread(job, Tokenising.tokenised, slices, num_workers, advance)


def mark_all(job: Tokenising, slices: Sequence[Slice], num_workers: int | None) -> list[Path]:
    """The folder of each slice's marks, in their order."""
    if len(slices) <= 1:
        return [job.marked(slice) for slice in slices]
    return spread(job, Tokenising.marked, slices, num_workers, lambda num_bytes: None)


def spread(
    job: Tokenising,
    what: Work,
    slices: Sequence[Slice],
    num_workers: int | None,
    advance: Advance,
) -> list[Path]:
    """What becomes of each slice, by processes that start from nothing.

    Forks of a process with threads may hang.
    """
    workers = min(num_workers or num_cores(), len(slices))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), begin, (job, os.getpid()))
    try:
        return list(in_order(pool, what, slices, AHEAD * workers, advance))
    except BrokenProcessPool:
        reason = "processes were too many: one was killed, for lack of memory perhaps"
        raise ConfigError("data.num_workers", workers, reason, "take fewer") from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    pool: ProcessPoolExecutor,
    what: Work,
    slices: Sequence[Slice],
    ahead: int,
    advance: Advance,
) -> Iterator[Path]:
    """Hand slices out, a few ahead of those that are awaited: an error stops the rest."""
    waiting: list[Any] = []
    for number in range(len(slices) + ahead):
        if number < len(slices):
            waiting.append(pool.submit(work, what, slices[number]))
        if number >= ahead:
            yield waiting.pop(0).result()
            advance(slices[number - ahead].num_bytes)


def begin(job: Tokenising, parent: int) -> None:
    """A worker's start: it ends with its parent, and leaves the other cores to the others."""
    os.environ["LLMTRAIN_PARENT"] = str(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    die_with_parent()
    _own["job"] = job


def work(what: Work, slice: Slice) -> Path:
    return what(_own["job"], slice)
