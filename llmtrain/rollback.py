"""Going back to the last good checkpoint, and on past the data that went wrong."""

import shutil
from dataclasses import asdict
from typing import NoReturn

from llmtrain import checkpoint
from llmtrain.errors import TrainingError
from llmtrain.folder import write_json
from llmtrain.rank_run import Run, Sums
from llmtrain.stability import Diverging, Rollback, Stability

REMEDY = "lower optimizer.lr, raise schedule.warmup_steps or set train.grad_clip, and start again"


def roll_back(run: Run, trouble: Diverging) -> None:
    """Continue from the newest checkpoint before the trouble, on all ranks together.

    Raises TrainingError, and leaves divergence.json, if there is none or it was done too often.
    """
    settings, stability = run.config.on_divergence, run.stability
    run.saver.settle()  # one on its way counts, if it is of before
    to_step = last_good_step(run, trouble.first_step)
    if to_step is None or len(stability.rollbacks) >= settings.max_rollbacks:
        give_up(run, trouble, has_checkpoint=to_step is not None)
    from_step = run.step
    saved = checkpoint.load(run.folder.checkpoint(to_step), run.engine, run.ranks)
    run.step = run.saver.last_step = saved["step"]
    run.sums = Sums.restored(saved["sums"], run.ranks.is_first)
    run.sums.start_clock()
    skipped = from_step - to_step if settings.skip_data else 0
    number = len(stability.rollbacks) + 1
    rollback = Rollback(number, trouble.reason, from_step, to_step, skipped)
    stability.go_back(Stability.restored(saved.get("stability", {})), rollback)
    run.is_ended = False
    rewrite_records(run)
    drop_checkpoints(run)


def last_good_step(run: Run, first_bad: int) -> int | None:
    """The newest checkpoint of before a step, as the first rank sees it; None: there is none."""
    found = [step for step in run.folder.checkpoint_steps() if step < first_bad]
    newest = max(found, default=0) if run.ranks.is_first else 0
    return int(run.sum(newest)) or None


def rewrite_records(run: Run) -> None:
    """Cut the metrics back, so that every step stands in them once, and say what happened.

    The callbacks, too, are as they were after that step.

    A rollback stands with the first step after it: whoever resumes from the checkpoint that it
    went to, and knows nothing of it yet, cuts it off.
    """
    if run.metrics is None:
        return
    run.metrics.cut_back(run.step)
    run.renew_hooks()
    for rollback in run.stability.rollbacks:
        if rollback.to_step >= run.step:
            values = asdict(rollback)
            run.metrics.record({"step": run.step + 1, "rollback": values.pop("number"), **values})


def drop_checkpoints(run: Run) -> None:
    """Delete the checkpoints that were gone back behind: a resume must not find them."""
    import torch.distributed as dist

    if run.ranks.is_first:
        for step in run.folder.checkpoint_steps():
            if step > run.step:
                shutil.rmtree(run.folder.checkpoint(step))
    dist.barrier(group=run.control)


def give_up(run: Run, trouble: Diverging, has_checkpoint: bool) -> NoReturn:
    """End the run with one line, and its last numbers beside it for a plot."""
    stability, settings = run.stability, run.config.on_divergence
    used_up = f"and on_divergence.max_rollbacks={settings.max_rollbacks} are used up"
    why = used_up if has_checkpoint else "and no checkpoint lies before it"
    if run.ranks.is_first:
        account = {
            "reason": trouble.reason,
            "step": run.step,
            "skipped_steps": stability.num_skipped,
            "rollbacks": [asdict(rollback) for rollback in stability.rollbacks],
            "settings": asdict(settings),
            "last_steps": stability.columns(),
        }
        write_json(run.folder.divergence, account)
    raise TrainingError(f"{trouble.reason}, {why}; {REMEDY}. Last losses: divergence.json.")
