"""What each rank runs: the one training loop, for every mode.

A rank reads its run folder and derives nothing: no Hydra, no planning.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from llmtrain.errors import (
    FAILED,
    STOPPED,
    ConfigError,
    OutOfMemory,
    TrainingError,
    is_final,
    is_out_of_memory,
)
from llmtrain.evaluation import evaluate, take_sample
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.metrics import Metrics
from llmtrain.rank_run import Run
from llmtrain.ranks import Ranks, die_with_parent, leave, show_stacks
from llmtrain.records import hyperparameters, log_step, summarise
from llmtrain.rollback import roll_back
from llmtrain.saving import (
    empty_cache,
    keep_best,
    problems,
    report,
    save_checkpoint,
    save_folder,
    settle,
    tell_of_checkpoints,
)
from llmtrain.stability import Diverging
from llmtrain.starting import start
from llmtrain.step import step_batches, train_step

STATUS_SECONDS = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def main(path: str) -> NoReturn:
    """Train the run in a folder as one of its ranks, and end this process."""
    die_with_parent()
    for number in STOP_SIGNALS:  # before the first step there is nothing to save
        signal.signal(number, lambda *_: os._exit(STOPPED))
    ranks = Ranks.from_environment()
    folder = RunFolder(path)
    redirect_output(folder.log(ranks.rank))
    show_stacks()
    folder.error(ranks.rank).unlink(missing_ok=True)
    try:
        train(folder, ranks)
    except BaseException as error:  # whatever it is, the process that watches us has to know
        try:
            note_failure(folder, ranks, error)
        finally:
            os._exit(FAILED)  # a peer may be stuck in a collective: do not wait for it in atexit
    leave()


def redirect_output(path: Path) -> None:
    """Everything that this process and its libraries print goes to the rank's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, sys.stdout.fileno())
    os.dup2(handle, sys.stderr.fileno())
    os.close(handle)


def note_failure(folder: RunFolder, ranks: Ranks, error: BaseException) -> None:
    """Leave the traceback in the log and one line for the user, with its time."""
    traceback.print_exc()
    sys.stderr.flush()
    if is_out_of_memory(error):
        error = OutOfMemory(error, num_steps=0)  # at the start
    text = str(error) if isinstance(error, ConfigError | TrainingError) else repr(error)
    steps = error.num_steps if isinstance(error, OutOfMemory) else None
    line = {"time": time.time(), "error": text, "traceback": traceback.format_exc()}
    line |= {"out_of_memory_after_steps": steps, "is_final": is_final(error)}
    write_json(folder.error(ranks.rank), line)


def train(folder: RunFolder, ranks: Ranks) -> None:
    """Start or continue the run and bring it to its end, or to a requested stop."""
    run = start(folder, ranks)
    install_stop_handler(run)
    with memory_watched(run):
        train_to_end(run)


@contextmanager
def memory_watched(run: Run) -> Iterator[None]:
    """Raise OutOfMemory, which says how far it went, for what libraries raise in its place."""
    first = run.step
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(error, run.step - first) from error


def train_to_end(run: Run) -> None:
    """All remaining steps, and what belongs before, between and after them."""
    if run.config.debug:
        show_first_batch(run)
    if run.step == 0:
        take_sample(run)
    run.engine.module.train()
    run.sums.start_clock()
    heed_callbacks(run)
    while not run.is_last_step:
        train_step(run)
        run.step += 1
        try:
            run.stability.check(run.config.on_divergence)
            after_step(run)
        except Diverging as trouble:  # on all ranks alike
            run.heartbeat.rest()
            roll_back(run, trouble)
        run.heartbeat.stepped(run.step)
        if run.any(run.is_stopping):  # all leave after the same step
            save_and_settle(run)
            heed_callbacks(run)
            finish(run, "stopped")
            return
    run.heartbeat.rest()
    close(run)


def save_and_settle(run: Run) -> None:
    """Leave a checkpoint of this step, unless the last steps might be gone back from."""
    run.heartbeat.rest()
    if run.step and not run.stability.is_suspicious(run.config.on_divergence):
        save_checkpoint(run)
    settle(run)


def install_stop_handler(run: Run) -> None:
    """A signal to stop is noted, and acted upon by all ranks together after the step."""

    def note(number: int, frame: Any) -> None:
        run.is_stopping = True

    for number in STOP_SIGNALS:
        signal.signal(number, note)


def after_step(run: Run) -> None:
    """Records, evaluation and checkpoint, each when it is due."""
    plan, step = run.plan, run.step
    if step % plan.log_every == 0 or run.is_last_step or step == 1:
        log_step(run)
    with run.off_the_clock():
        if step % plan.eval_every == 0 or run.is_last_step:
            evaluate_on_the_way(run)
        tell_of_epochs(run)
    heed_callbacks(run)
    if run.is_ended:
        catch_up(run)
    with run.off_the_clock():
        is_due = step % plan.checkpoint_every == 0 and not run.is_last_step
        if is_due and not run.stability.is_suspicious(run.config.on_divergence):
            save_checkpoint(run)
        run.saver.poll()
        tell_of_checkpoints(run)
    more = {"eta_seconds": run.eta_seconds, **run.stability.status(), **problems(run)}
    report(run.folder, run.ranks, "running", step, every=STATUS_SECONDS, **more)


def tell_of_epochs(run: Run) -> None:
    """An epoch ends with the step that reads its last sequence."""
    batch, size = run.plan.global_batch, len(run.sequences)
    position = (run.step + run.stability.data_offset) * batch
    for epoch in range((position - batch) // size, position // size):
        run.hooks.call("on_epoch_end", epoch + 1)


def heed_callbacks(run: Run) -> None:
    """Have all ranks know what the callbacks made of the step, which the first alone calls.

    Raises TrainingError, when a checkpoint is safe, for one that failed.
    """
    if not run.config.callback:
        return
    if run.any(run.hooks.failure is not None):
        save_and_settle(run)
        raise TrainingError(run.said_by_first(run.hooks.failure))
    run.is_ended = run.any(run.hooks.reason is not None)


def catch_up(run: Run) -> None:
    """The last step's record and evaluation, where the end came before they were due."""
    if run.sums.steps:
        log_step(run)
    with run.off_the_clock():
        if run.step % run.plan.eval_every and run.step < run.plan.num_steps:
            evaluate_on_the_way(run)


def evaluate_on_the_way(run: Run) -> None:
    """A held-out record; the best model so far is kept."""
    empty_cache(run)
    loss = evaluate(run, run.plan.eval_sequences)["eval_loss"]
    empty_cache(run)
    keep_best(run, loss)


def show_first_batch(run: Run) -> None:
    """What the model is about to read, for the eye: text, ids and the labels they predict."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.manifest.vocabulary.folder)
    batch = next(step_batches(run))
    shapes = {name: tuple(values.shape) for name, values in batch.items()}
    ids, labels = (batch[name][0].tolist() for name in ("input_ids", "labels"))
    text = f"first batch: {shapes}\n{tokenizer.decode(ids)}\nids {ids}\nlabels {labels}\n"
    if run.ranks.is_first:
        write_text(run.folder.first_batch, text)


def close(run: Run) -> None:
    """The end of training: the closing evaluation, a sample, the final model and the summary."""
    save_checkpoint(run)
    settle(run)
    heed_callbacks(run)
    report(run.folder, run.ranks, "running", run.step, phase="evaluating")
    values = evaluate(run, run.plan.final_eval_sequences, record=False)
    take_sample(run)
    save_folder(run, run.folder.final, values["eval_loss"])
    if run.metrics is not None:
        summary = summarise(run, values)
        run.metrics.hparams(hyperparameters(run), {"hparam/eval_loss": values["eval_loss"]})
        write_json(run.folder.summary, summary)
    finish(run, "done")


def close_records(metrics: Metrics, state: str) -> None:
    """Where a stopped run's last records find no room, it repeats their steps when it continues."""
    try:
        metrics.close()
    except TrainingError:
        if state != "stopped":
            raise


def finish(run: Run, state: str) -> None:
    """Leave the process group and say how the run ended."""
    import torch.distributed as dist

    if run.metrics is not None:
        close_records(run.metrics, state)
    dist.barrier(group=run.control)
    more: dict[str, Any] = {**run.stability.status(), **problems(run)}
    report(run.folder, run.ranks, state, run.step, **more)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
