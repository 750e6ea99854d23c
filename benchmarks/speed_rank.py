"""Ours in benchmarks.speed: `python -m benchmarks.speed_rank RUN_FOLDER engine|plain`.

A rank that starts as those of any run, and then trains when its turn comes. It leaves the weights
that it starts from and the tokens that it reads, for its peers. ``plain`` is the same model and
loss in a bare loop with fp32 masters, to see what the engine and the records cost.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.peers.turn import Step, Turns
from llmtrain import starting, step, train
from llmtrain.folder import RunFolder
from llmtrain.rank_run import Run
from llmtrain.ranks import Ranks
from llmtrain.records import gradient_norm

NUM_STEPS = 64  # whose tokens peers read, and then again


def main(path: str, how: str) -> None:
    turns = Turns()

    def measure(folder: RunFolder, ranks: Ranks) -> None:
        run = starting.start(folder, ranks)
        leave_for_peers(run)
        run.engine.module.train()
        run.sums.start_clock()
        turns.take(plain_step(run) if how == "plain" else engine_step(run))

    with patch.object(train, "train", measure):  # all around it is as a rank of ours has it
        train.main(path)


def weights_of(folder: RunFolder) -> Path:
    return folder.path / "weights"


def tokens_of(folder: RunFolder) -> Path:
    return folder.path / "tokens.npy"


def leave_for_peers(run: Run) -> None:
    """The weights to start from, and [steps, batch, length + 1] tokens."""
    run.engine.module.model.save_pretrained(weights_of(run.folder))
    rows = []
    for run.step in range(NUM_STEPS):
        batches = list(step.step_batches(run))
        inputs_BL = torch.cat([batch["input_ids"] for batch in batches])
        labels_BL = torch.cat([batch["labels"] for batch in batches])
        rows.append(torch.cat([inputs_BL, labels_BL[:, -1:]], 1).numpy())
    run.step = 0
    np.save(tokens_of(run.folder), np.stack(rows).astype(np.int32))


def engine_step(run: Run) -> Step:
    """A step as the training loop has it, records and all."""
    taken: list[tuple[float, float]] = []
    real = step.note_step

    def note(run: Run, mean_loss: float) -> None:
        taken.append((mean_loss, float(gradient_norm(run))))
        real(run, mean_loss)

    stack = ExitStack()
    stack.enter_context(patch.object(step, "note_step", note))

    def one() -> tuple[float, float]:
        step.train_step(run)
        run.step += 1
        run.stability.check(run.config.on_divergence)
        train.after_step(run)
        run.heartbeat.stepped(run.step)
        return taken[-1]

    return one


def plain_step(run: Run) -> Step:
    """Forward, backward, clipping and a fused AdamW over fp32 masters: nothing else."""
    objective = run.engine.module
    params = [param for param in objective.parameters() if param.requires_grad]
    masters = [param.detach().float() for param in params]
    wanted = run.config.optimizer
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": wanted.weight_decay},
        {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (wanted.beta1, wanted.beta2)
    optimizer = torch.optim.AdamW(groups, lr=wanted.lr, betas=betas, fused=True)

    def one() -> tuple[float, float]:
        total, batches = 0.0, list(step.step_batches(run))
        num_tokens = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
        for batch in batches:
            loss = objective(batch).loss_sum / num_tokens
            loss.backward()
            total += float(loss.detach())
        for param, master in zip(params, masters, strict=True):
            master.grad, param.grad = param.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters, run.plan.grad_clip)
        optimizer.step()
        torch._foreach_copy_(params_data(params), masters)
        run.step += 1
        return total, float(norm)

    return one


def params_data(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [param.data for param in params]


if __name__ == "__main__":
    main(*sys.argv[1:])
