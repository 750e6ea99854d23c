"""The process of one trial: a fork of one that has imported all, which no other trial waits for."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from launchers import warm
from launchers.local import FOR_LIBRARIES
from llmtrain.config import RunConfig
from llmtrain.errors import FAILED, REFUSED, STOPPED, ConfigError, TrainingError
from llmtrain.hardware import num_cores, resolve
from llmtrain.on_finish import Afterwards, OnFinish
from llmtrain.training import library_settings
from llmtrain.trials.seats import Seat

Run = Callable[[RunConfig, Afterwards], Any]

LOST = 255  # multiprocessing's exit code of a process whose parent, the warm one, is dead
DEAF = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)  # what is meant for the sweep
LOOK_SECONDS = 0.5  # at whether the sweep still lives


class Told(Afterwards):
    """Tells the sweep when a run begins to be prepared and to be trained, and where it lies."""

    def __init__(self, link: Connection) -> None:
        super().__init__()
        self.link = link

    @contextmanager
    def preparing(self, on_finish: OnFinish) -> Iterator[None]:
        self.link.send(("preparing", None))
        with super().preparing(on_finish):
            yield
        self.link.send(("prepared", None))

    @contextmanager
    def follow(self, on_finish: OnFinish, run: Path) -> Iterator[None]:
        self.link.send(("training", run))
        with super().follow(on_finish, run):
            yield


class Trainer:
    """Runs one trial beside this process; ``says`` are its messages, ``code`` how it ended."""

    def __init__(
        self, run: Run, words: list[str], config: RunConfig, seat: Seat, log: Path | None
    ) -> None:
        context = get_context("forkserver")
        self.link, theirs = context.Pipe(duplex=False)
        given = (run, words, config, seat, log, theirs)
        self.process = context.Process(target=train, args=given, name=" ".join(words))
        self.process.start()
        theirs.close()

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    @property
    def sentinel(self) -> int:
        return self.process.sentinel

    def messages(self) -> Iterator[tuple[str, Any]]:
        """What it has said since the last look."""
        try:
            while self.link.poll():
                yield self.link.recv()
        except EOFError:
            return

    def stop(self) -> None:
        """Ask it to save and leave."""
        if self.code is None:
            self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def heat(config: RunConfig) -> None:
    """Start the process that all trials are forks of, with what their ranks' libraries are told."""
    device = resolve(config.hardware).device
    told = FOR_LIBRARIES | library_settings(config, device)
    told |= {"OMP_NUM_THREADS": str(num_cores())}
    told.pop("CUDA_VISIBLE_DEVICES", None)  # a matter of the seat
    before = dict(os.environ)
    os.environ.update(told)
    signal.pthread_sigmask(signal.SIG_BLOCK, DEAF)  # until it is deaf to them
    try:
        from multiprocessing import forkserver

        get_context("forkserver").set_forkserver_preload(preloaded(config))
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF)
        os.environ.clear()
        os.environ.update(before)


def preloaded(config: RunConfig) -> list[str]:
    """The modules that a rank imports before its first step."""
    kind = config.model.architecture
    found = ["llmtrain.trials.imports"]
    if kind is not None:
        found.append(f"transformers.models.{kind}.modeling_{kind}")
    # On a GPU peft imports bitsandbytes, which asks CUDA what there is: a fork could not use it.
    is_with_peft = config.adapter.freezes and resolve(config.hardware).device == "cpu"
    return [*found, "peft"] if is_with_peft else found


def train(
    run: Run,
    words: list[str],
    config: RunConfig,
    seat: Seat,
    log: Path | None,
    link: Connection,
) -> None:
    """Be the trial's process: as the command of its words would be, but for the imports."""
    os.setsid()  # Ctrl+C reaches the sweep alone, which says what is to become of us
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    leave_with_sweep()
    warm.heat()
    sys.argv[1:] = words
    if log is not None:
        redirect(log)
    seat.take()
    try:
        run(config, Told(link))
    except (ConfigError, TrainingError) as error:
        link.send(("error", str(error)))
        sys.exit(REFUSED if isinstance(error, ConfigError) else FAILED)
    except KeyboardInterrupt:
        sys.exit(STOPPED)


def redirect(log: Path) -> None:
    """Everything that this process says goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def leave_with_sweep() -> None:
    """Stop in good order soon after the sweep is gone; no thread may look for us."""

    def look(number: int, frame: Any) -> None:
        sweep = parent_process()
        if sweep is not None and not sweep.is_alive():
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)
