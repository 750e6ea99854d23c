"""Saving behind training's back: at most one checkpoint on its way, published when it is whole."""

import math
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import store
from llmtrain.checkpoint.snapshot import Snapshot
from llmtrain.folder import RunFolder, publish, write_json
from llmtrain.ranks import Ranks

ROOM = 1.05  # of a checkpoint's bytes have to be free


@dataclass
class Retention:
    """Which checkpoints stay: the newest ``keep``, every ``keep_every``-th step's, the best."""

    keep: int
    keep_every: int | None


@dataclass
class Saver:
    """Writes snapshots of all ranks, each its own part, and publishes what all have written.

    ``over_ranks`` sums a number over ranks; all of them call each method after the same step.
    ``problem`` says on the first rank why the last checkpoint was not written, ``published`` which
    steps' were since somebody took them from there.
    """

    folder: RunFolder
    ranks: Ranks
    over_ranks: Callable[[float], float]
    retention: Retention
    versions: dict[str, Any]
    mirror: Path | None = None
    is_asynchronous: bool = True
    problem: str | None = None
    published: deque[int] = field(default_factory=deque)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "save"))
    last_step: int | None = None  # the ranks must not ask the disk: it is another one's to publish
    snapshot: Snapshot | None = None  # that is on its way
    part: "Future[None] | None" = None
    publication: "Future[None] | None" = None

    def save(self, take: Callable[[], Snapshot], num_bytes: float, step: int) -> None:
        """Begin to write a snapshot; the one before is published first.

        Where the disk has no room for all ranks' ``num_bytes`` nothing is taken, and training goes
        on; they are infinite where there was none for the records that the checkpoint continues.
        """
        self.settle()
        if step == self.last_step:
            return  # nothing was learned since
        needed = self.over_ranks(num_bytes)
        if not self.has_room(needed):
            of = f"its {needed / 2**30:.2f} GiB" if needed < math.inf else "the records before it"
            self.problem = f"the disk has no room for {of}"
            return
        self.problem, self.last_step = None, step
        self.snapshot = take()
        self.part = self.pool.submit(self.write_part)
        if not self.is_asynchronous:
            self.settle()

    def write_part(self) -> None:
        """What this rank has to write of the snapshot."""
        assert self.snapshot is not None
        files = {"rng": self.snapshot.random}
        if self.snapshot.tensors:
            files["rank"] = self.snapshot.tensors
        store.write_part(self.partial(self.snapshot.step), files, self.ranks.rank)

    def has_room(self, needed: float) -> bool:
        """Whether the first rank's disk has; all ranks hear the same."""
        lacks = self.ranks.is_first and store.free_bytes(self.folder.checkpoints) < ROOM * needed
        return self.over_ranks(float(lacks)) == 0

    def partial(self, step: int) -> Path:
        """Where a checkpoint grows until it is whole."""
        return self.folder.checkpoints / f".step_{step}.partial"

    def poll(self) -> None:
        """After a step: have what all ranks have written published."""
        if (
            self.part is not None
            and self.over_ranks(float(self.part.done())) == self.ranks.world_size
        ):
            self.hand_over()

    def settle(self) -> None:
        """Wait for what is on its way."""
        if self.part is not None:
            self.part.exception()  # waits
            self.hand_over()
        if self.publication is not None:
            self.note(self.publication.exception())
            self.publication = None

    def hand_over(self) -> None:
        """All parts have ended: publish them on the first rank, or give up what lacks one."""
        assert self.part is not None and self.snapshot is not None
        snapshot, error = self.snapshot, self.part.exception()
        path = self.partial(snapshot.step)
        num_failed = self.over_ranks(float(error is not None))
        if num_failed:
            self.note(error or OSError("another rank could not write its part"))
            self.part = self.snapshot = self.last_step = None
            if self.ranks.is_first:
                shutil.rmtree(path, ignore_errors=True)
            return
        self.part = self.snapshot = None
        if self.ranks.is_first:
            if self.publication is not None:
                self.note(self.publication.exception())
            self.publication = self.pool.submit(self.complete, path, snapshot.state)

    def complete(self, path: Path, state: dict[str, Any]) -> None:
        """Add what the first rank knows, publish, and look after the other checkpoints."""
        try:
            write_json(path / "state.json", state)
            store.write_manifest(path, {"step": state["step"], **self.versions})
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        published = self.folder.checkpoint(state["step"])
        publish(path, published)
        self.published.append(state["step"])
        kept, best = self.retention, state.get("best_step")
        store.thin_out(self.folder.checkpoints, kept.keep, kept.keep_every, best)
        if self.mirror is not None:
            copy_to(self.mirror, published)
            store.thin_out(self.mirror, kept.keep, kept.keep_every, best)

    def note(self, error: BaseException | None) -> None:
        if error is not None:
            self.problem = getattr(error, "strerror", None) or str(error)


def copy_to(mirror: Path, published: Path) -> None:
    """Copy a checkpoint to the second place. Raises OSError that says that it is this one."""
    try:
        mirror.mkdir(parents=True, exist_ok=True)
        store.copy(published, mirror / published.name)
    except (OSError, shutil.Error) as error:
        raise OSError(f"its copy at {mirror} failed ({reason_of(error)})") from error


def reason_of(error: OSError) -> str:
    """One line; copying a folder gives a list of triples."""
    said = error.args[0][0][-1] if isinstance(error, shutil.Error) else error.strerror
    return str(said or error)
