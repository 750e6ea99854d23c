"""One optimizer step: this rank's micro-batches of a global batch, forward and backward."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmtrain import checkpoint
from llmtrain.rank_run import Run, Sums
from llmtrain.records import gradient_norm
from llmtrain.stability import TakenStep

if TYPE_CHECKING:
    import torch


def train_step(run: Run) -> None:
    """One optimizer step over this rank's micro-batches of the global batch.

    Where the loss or the gradient is not finite on any rank, all leave everything as it was.
    """
    set_learning_rate(run)
    batches = list(step_batches(run))  # on the host, so that counting waits for no device
    num_tokens = int(run.sum(sum(int((batch["labels"] >= 0).sum()) for batch in batches)))
    sums = Sums(tokens=num_tokens, sequences=run.plan.global_batch, steps=1)
    for number, batch in enumerate(batches, 1):
        loss = run.engine(run.on_device(batch))
        run.engine.backward(objective_value(run, loss, num_tokens), scale_wrt_gas=False)
        gather(sums, loss, len(batches) * run.ranks.world_size)
        if number == len(batches):  # read before the step: the engine waits for the gradient, too
            mean_loss = run.sum(float(sums.loss)) / num_tokens
        run.engine.step()
    sums.skipped = int(not run.engine.was_step_applied())
    run.sums.add(sums)
    note_step(run, mean_loss)


def gather(sums: Sums, loss: Any, num_micro_batches: int) -> None:
    """Add a micro-batch, one of so many over all ranks."""
    sums.loss = sums.loss + loss.loss_sum.detach().double()
    for name, value in loss.extras.items():
        share = value.detach().double() / num_micro_batches
        sums.extras[name] = sums.extras.get(name, 0.0) + share


def note_step(run: Run, mean_loss: float) -> None:
    """Remember the step that was just taken, alike on all ranks."""
    was_skipped = not run.engine.was_step_applied()
    rate = run.engine.optimizer.param_groups[0]["lr"]
    taken = TakenStep(run.step + 1, mean_loss, gradient_norm(run), rate, was_skipped)
    is_overflow = was_skipped and math.isfinite(mean_loss) and scale_can_fall(run)
    run.stability.note(taken, is_overflow)


def scale_can_fall(run: Run) -> bool:
    """Whether an overflow may be the loss scale's, which falls until gradients fit 16 bits."""
    scaler = checkpoint.scaler(run.engine)
    least = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None)
    return least is not None and scaler.cur_scale > least


def objective_value(run: Run, loss: Any, num_tokens: int) -> "torch.Tensor":
    """A micro-batch's part of the mean over the whole step's tokens.

    The engine averages gradients over ranks, so the sum is multiplied by their number. A penalty
    is a mean over the micro-batch and counts by its share of the tokens. What is not finite gives a
    gradient that is not, on every rank once they are added up.
    """
    import torch

    total = loss.loss_sum + loss.penalty * loss.num_tokens
    mark = torch.where(torch.isfinite(total.detach()), 1.0, math.nan).to(total.dtype)
    value: torch.Tensor = total * mark * (run.ranks.world_size / num_tokens)
    return value


def set_learning_rate(run: Run) -> None:
    """The rate of this step, as each group's own rate times the schedule's factor."""
    plan = run.plan
    factor = run.config.schedule.factor(run.step, plan.num_steps, plan.warmup_steps)
    for group in run.engine.optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * factor


def step_batches(run: Run) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of the current step."""
    from llmtrain.data.order import rank_share

    plan, position = run.plan, run.step + run.stability.data_offset
    indices = run.sequences.order(run.config.seed, position, plan.global_batch)
    ranks = run.ranks
    is_partitioned = plan.zero_stage == 3 and ranks.world_size > 1
    for number, share in enumerate(
        rank_share(indices, ranks.rank, ranks.world_size, plan.micro_batch)
    ):
        key = hash((run.config.seed, position, number))
        batch = run.batch(run.sequences, share)
        yield run.config.mode.rewritten(run.engine.module.learner, batch, key, is_partitioned)
