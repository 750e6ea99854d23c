"""One optimizer step: this rank's micro-batches of a global batch, forward and backward."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmtrain.rank_run import Run

if TYPE_CHECKING:
    import torch


def train_step(run: Run) -> None:
    """One optimizer step over this rank's micro-batches of the global batch."""
    set_learning_rate(run)
    batches = list(step_batches(run))  # on the host, so that counting waits for no device
    num_tokens = int(run.sum(sum(int((batch["labels"] >= 0).sum()) for batch in batches)))
    for batch in batches:
        loss = run.engine(run.on_device(batch))
        run.engine.backward(objective_value(run, loss, num_tokens), scale_wrt_gas=False)
        run.engine.step()
        # In doubles a sum of a few floats is exact, so a resume in its middle changes no bit.
        run.sums.loss = run.sums.loss + loss.loss_sum.detach().double()
        for name, value in loss.extras.items():
            share = value.detach().double() / (len(batches) * run.ranks.world_size)
            run.sums.extras[name] = run.sums.extras.get(name, 0.0) + share
    run.sums.tokens += num_tokens
    run.sums.sequences += run.plan.global_batch
    run.sums.steps += 1


def objective_value(run: Run, loss: Any, num_tokens: int) -> "torch.Tensor":
    """A micro-batch's part of the mean over the whole step's tokens.

    The engine averages gradients over ranks, so the sum is multiplied by their number. A penalty
    is a mean over the micro-batch and counts by its share of the tokens.
    """
    total = loss.loss_sum + loss.penalty * loss.num_tokens
    value: torch.Tensor = total * (run.ranks.world_size / num_tokens)
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
    from llmtrain.data.order import rank_share, step_sequences

    plan = run.plan
    indices = step_sequences(run.config.seed, run.step, plan.global_batch, len(run.sequences))
    ranks = run.ranks
    is_partitioned = plan.zero_stage == 3 and ranks.world_size > 1
    for number, share in enumerate(
        rank_share(indices, ranks.rank, ranks.world_size, plan.micro_batch)
    ):
        key = hash((run.config.seed, run.step, number))
        batch = run.batch(run.sequences, share)
        yield run.config.mode.rewritten(run.engine.module.learner, batch, key, is_partitioned)
