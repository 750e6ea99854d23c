"""What a run leaves on the disk on its way: checkpoints, models and how it is."""

import math
import time
from pathlib import Path
from typing import Any

from llmtrain import checkpoint
from llmtrain.errors import is_disk_full
from llmtrain.folder import RunFolder, finite
from llmtrain.rank_run import Run
from llmtrain.ranks import Ranks

_last_report = 0.0


def empty_cache(run: Run) -> None:
    """Give back what torch keeps: the next phase asks for blocks of other sizes."""
    import torch

    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def save_checkpoint(run: Run) -> None:
    """Begin to save resumable state; it is published when all ranks have written their part."""
    empty_cache(run)
    is_recorded = run.metrics is None or run.metrics.sync(run.step)
    extra = {
        "best_loss": finite(run.best_loss),
        "best_step": run.best_step,
        "elapsed_seconds": run.elapsed_seconds,
        "sums": run.sums.saved(run.sum),
        "stability": run.stability.saved(),
    }
    copy, owns = run.plan.saves_behind, run.ranks.is_first or run.plan.zero_stage > 0
    run.saver.save(
        lambda: checkpoint.take(run.engine, run.ranks, run.step, extra, copy),
        owns * run.plan.memory["checkpoint_gib"] * 2**30 if is_recorded else math.inf,
        run.step,
    )


def settle(run: Run) -> None:
    """Wait for the checkpoint that is on its way."""
    run.saver.settle()
    tell_of_checkpoints(run)


def tell_of_checkpoints(run: Run) -> None:
    """Show the callbacks what was published since the last look."""
    while run.saver.published:
        step = run.saver.published.popleft()
        run.hooks.call("on_save", step, run.folder.checkpoint(step))


def keep_best(run: Run, loss: float) -> None:
    """Keep the model if it is the best so far; where the disk is full, the one before stays."""
    if loss >= run.best_loss:
        return
    try:
        save_folder(run, run.folder.best, loss)
        was_full = False
    except OSError as error:  # on the first rank alone, after all have given what they have
        if not is_disk_full(error):
            raise
        was_full = True
    if not run.any(was_full):
        run.best_loss, run.best_step = loss, run.step


def problems(run: Run) -> dict[str, str]:
    """What status.json has to say of the last checkpoint, if it was not written."""
    what = run.saver.problem
    return {} if what is None else {"warning": f"Saving a checkpoint failed: {what}."}


def save_folder(run: Run, path: Path, loss: float) -> None:
    """A Hugging Face folder of the model as it is now."""
    from llmtrain.artefacts import readme, save_model

    empty_cache(run)
    text = readme(
        run.plan.name,
        path,
        f"{run.step} steps, {run.step * run.plan.tokens_per_step:,} tokens, "
        f"held-out loss {loss:.4f}",
        opening=run.config.adapter.opening,
        has_code=run.plan.code_fingerprint is not None,
    )
    save_model(path, run.engine, run.manifest, text, run.ranks.is_first)


def report(
    folder: RunFolder, ranks: Ranks, state: str, step: int, every: float = 0.0, **more: Any
) -> None:
    """Refresh status.json from the first rank, at most once in ``every`` seconds."""
    global _last_report
    if ranks.is_first and time.time() - _last_report >= every:
        folder.write_status(state, step, **more)
        _last_report = time.time()
