"""Trains small runs inside one or two rank processes, one after the other, and says what came out.

`python -m tests.on_ranks JOB.json`, once for each rank: the same code as a rank of ours, without a
fresh start of Python for every run.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from llmtrain import checkpoint, saving, starting
from llmtrain.checkpoint.pieces import by_flat, inner_state, scalars
from llmtrain.checkpoint.snapshot import owned_tensors
from llmtrain.folder import RunFolder
from llmtrain.rank_run import Run, Sums
from llmtrain.ranks import Ranks
from llmtrain.records import gradient_norm
from llmtrain.rollback import roll_back
from llmtrain.stability import Diverging
from llmtrain.step import step_batches, train_step


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    ranks = Ranks.from_environment()
    results = [globals()[task["do"]](task, ranks) for task in job["tasks"]]
    if ranks.is_first:
        Path(job["results"]).write_text(json.dumps(results))


def curve(task: dict[str, Any], ranks: Ranks) -> list[float]:
    """The loss of each of a run's steps, summed over ranks."""
    run = starting.start(RunFolder(task["folder"]), ranks)
    run.engine.module.train()
    losses = []
    while run.step < run.plan.num_steps:
        losses.append(one_step(run))
    run.engine.destroy()
    return losses


def one_step(run: Run) -> float:
    """Train a step; its mean loss over all ranks."""
    run.engine.module.train()
    run.sums = Sums()
    train_step(run)
    run.step += 1
    return run.sum(float(run.sums.loss)) / run.sums.tokens


def gradient_norms(task: dict[str, Any], ranks: Ranks) -> list[float]:
    """The norm that is recorded for each of a run's steps."""
    run = starting.start(RunFolder(task["folder"]), ranks)
    norms = []
    while run.step < run.plan.num_steps:
        one_step(run)
        norms.append(float(gradient_norm(run)))
    run.engine.destroy()
    return norms


def save_and_continue(task: dict[str, Any], ranks: Ranks) -> list[float]:
    """Half of a run, a checkpoint, and the other half in an engine that was filled from it."""
    folder = RunFolder(task["folder"])
    run = starting.start(folder, ranks)
    half = run.plan.num_steps // 2
    losses = [one_step(run) for _ in range(half)]
    saving.save_checkpoint(run)
    run.saver.settle()
    run.engine.destroy()
    run = starting.start(folder, ranks)
    assert run.step == half
    losses += [one_step(run) for _ in range(half)]
    run.engine.destroy()
    return losses


def leg(task: dict[str, Any], ranks: Ranks) -> list[float]:
    """Some steps of a run that others may have begun, and a checkpoint for the next."""
    run = starting.start(RunFolder(task["folder"]), ranks)
    losses = [one_step(run) for _ in range(task["steps"])]
    saving.save_checkpoint(run)
    run.saver.settle()
    run.engine.destroy()
    return losses


def skipped_step(task: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Two steps, a third that goes wrong on the last rank alone, a fourth; back, and it again.

    ``wrong`` is what one micro-batch's loss is multiplied with and added to: NaN times it spoils
    the gradient, infinity added to it does not. ``weight``: only the first one's gradient is NaN.
    """
    run = starting.start(RunFolder(task["folder"]), ranks)
    losses = [one_step(run) for _ in range(2)]
    saving.save_checkpoint(run)
    before = state_of(run)
    factor, term = (float(word) for word in task["wrong"])
    first = ranks.rank == ranks.world_size - 1

    def spoil(module: Any, inputs: Any, loss: Any) -> Any:
        nonlocal first
        is_spoilt, first = first, False
        return loss._replace(loss_sum=loss.loss_sum * factor + term) if is_spoilt else None

    def spoil_one(gradient: Any) -> Any:
        nonlocal first
        is_spoilt, first = first, False
        return gradient * float("nan") if is_spoilt else gradient

    if task.get("weight"):
        hook = next(run.engine.module.parameters()).register_hook(spoil_one)
    else:
        hook = run.engine.module.register_forward_hook(spoil)
    run.sums = Sums()
    train_step(run)
    run.step += 1
    hook.remove()
    same = run.sum(float(state_of(run) == before)) == ranks.world_size
    sums, stability = run.sums, run.stability
    losses.append(one_step(run))
    learned = run.sum(float(state_of(run) != before)) == ranks.world_size
    counted = [stability.num_skipped, sums.skipped, sums.steps, sums.tokens, float(sums.loss)]
    run.step = 3  # so that the fourth step's data follow
    roll_back(run, Diverging("It was asked for", first_step=3))
    restored = run.sum(float(state_of(run) == before)) == ranks.world_size
    again = one_step(run)
    run.engine.destroy()
    found = {"same": same, "counted": counted, "learned": learned, "restored": restored}
    return found | {"fourth": losses[-1], "again": again}


def state_of(run: Run) -> dict[str, Any]:
    """All that this rank's optimizer owns, bit by bit, and its single numbers."""
    tensors = owned_tensors(run.engine, copy=True)
    numbers = [
        scalars(inner_state(run.engine, flat)) for flat, _ in by_flat(checkpoint.pieces(run.engine))
    ]
    return {"scalars": numbers} | {
        name: values.float().numpy().tobytes() for name, values in tensors.items()
    }


def final_logits(task: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Train a run, write final/, and give the trainer's logits of a fixed text."""
    import torch

    run = starting.start(RunFolder(task["folder"]), ranks)
    losses = [one_step(run) for _ in range(run.plan.num_steps)]
    saving.save_folder(run, run.folder.final, losses[-1])
    run.engine.module.eval()
    run.engine.module.learner.forget_documents()
    with torch.no_grad():
        tokens_BL = torch.arange(2, 18)[None]
        logits_BLV = run.engine.module.model(tokens_BL, use_cache=False).logits
    size = sum(len(piece.view(piece.flat)) for piece in checkpoint.pieces(run.engine))
    run.engine.destroy()
    return {"losses": losses, "logits": logits_BLV[0, -1].float().tolist(), "owned": size}


def first_gradients(task: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """How many parameters are trained, and what the first step teaches each matrix B of a LoRA.

    Of the largest gradients of B's columns the smallest: an expert has columns of its own.
    """
    run = starting.start(RunFolder(task["folder"]), ranks)
    run.engine.module.train()
    for batch in step_batches(run):
        run.engine.backward(run.engine(batch).loss_sum)
    trained = {name: p for name, p in run.engine.module.named_parameters() if p.requires_grad}
    matrices = {name: param for name, param in trained.items() if "lora_B" in name}
    faintest = {name: float(p.grad.abs().amax(0).min()) for name, p in matrices.items()}
    run.engine.destroy()
    return {"faintest": faintest, "num_trained": sum(param.numel() for param in trained.values())}


def end_of_document(task: dict[str, Any], ranks: Ranks) -> float:
    """The gradient that the embedding of the token that ends documents gets from being read."""
    import torch

    run = starting.start(RunFolder(task["folder"]), ranks)
    eos_id = run.manifest.vocabulary.eos_id
    embedding = run.engine.module.model.get_input_embeddings()
    (gradient_VD,) = torch.autograd.grad(embedding(torch.tensor([eos_id])).sum(), embedding.weight)
    return float(gradient_VD[eos_id].abs().max())


def live_bytes(task: dict[str, Any], ranks: Ranks) -> int:
    """The most bytes of tensors that live at once in a run's third step; of this rank."""
    import torch

    from llmtrain.live import LiveTensors

    run = starting.start(RunFolder(task["folder"]), ranks)
    for _ in range(2):
        one_step(run)
    gc.collect()
    account = LiveTensors(run.plan.has_wide_products)
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            account.add(each)
            if each.is_leaf and each.grad is not None:
                account.add(each.grad)
    del each
    with account:
        one_step(run)
    run.engine.destroy()
    return account.peak_bytes


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # groups of engines that are gone are not taken down one by one
