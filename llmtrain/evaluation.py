"""Held-out loss and text samples of a running model, on all of its ranks together."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmtrain.rank_run import Run
from llmtrain.stability import Diverging

if TYPE_CHECKING:
    from llmtrain.data.sequences import Sequences

SAMPLE_TOKENS = 64
PROMPT_TOKENS = 16


def evaluate(run: Run, num_sequences: int, record: bool = True) -> dict[str, float]:
    """Loss, perplexity and bits per byte over some held-out sequences, on all ranks together.

    Raises Diverging where they are not finite.
    """
    import torch

    sequences = run.held_out
    num_sequences = min(num_sequences, len(sequences))
    run.engine.module.eval()
    loss_sum, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in held_out_batches(run, sequences, num_sequences):
            loss = run.engine(run.on_device(batch))
            loss_sum += float(loss.loss_sum)
            num_tokens += int(loss.num_tokens)
    run.engine.module.train()
    loss_sum, num_tokens = run.sum(loss_sum), int(run.sum(num_tokens))
    if not math.isfinite(loss_sum):
        raise Diverging(f"Step {run.step}: the held-out loss is not finite", run.step)
    held_out = run.manifest.held_out
    num_bytes = held_out.num_bytes * num_tokens / max(1, held_out.num_learned_tokens)
    values = {
        "step": run.step,
        "eval_loss": loss_sum / num_tokens,
        "eval_perplexity": math.exp(min(loss_sum / num_tokens, 700.0)),
        "eval_bits_per_byte": loss_sum / math.log(2) / num_bytes,
    }
    if record:
        run.record(values)
    return values


def held_out_batches(
    run: Run, sequences: "Sequences", num_sequences: int
) -> Iterator[dict[str, Any]]:
    """This rank's share, in micro-batches; each rank gets as many, the last without labels."""
    import numpy as np

    size, ranks = run.plan.micro_batch, run.ranks
    chosen = np.arange(num_sequences) * len(sequences) // num_sequences  # from all over the split
    num_rounds = -(-num_sequences // (size * ranks.world_size))
    for number in range(num_rounds):
        first = (number * ranks.world_size + ranks.rank) * size
        indices = np.arange(first, first + size)
        batch = run.batch(sequences, chosen[np.minimum(indices, num_sequences - 1)])
        batch["labels"][np.flatnonzero(indices >= num_sequences)] = -100
        yield batch


def take_sample(run: Run) -> str:
    """A text that the model writes from the beginning of a held-out sequence; on all ranks."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.manifest.vocabulary.folder)
    sequences, model = run.held_out, run.engine.module.model
    room = run.plan.max_seq_len or run.plan.seq_len + SAMPLE_TOKENS
    most = PROMPT_TOKENS if not run.manifest.has_masks else room - SAMPLE_TOKENS
    prompt_BL = torch.from_numpy(sequences.prompt(max(1, min(most, run.plan.seq_len))))[None]
    model.eval()
    run.engine.module.learner.forget_documents()
    with torch.no_grad(), fork_rng(run):  # training's random numbers go on as they were
        torch.manual_seed(run.config.seed)
        written_BL = model.generate(
            prompt_BL.to(run.device),
            attention_mask=torch.ones_like(prompt_BL, device=run.device),
            max_new_tokens=max(1, min(SAMPLE_TOKENS, room - prompt_BL.shape[1])),
            synced_gpus=run.plan.zero_stage == 3 and run.ranks.world_size > 1,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
        )
    model.train()
    prompt = str(tokenizer.decode(prompt_BL[0]))
    text = str(tokenizer.decode(written_BL[0, prompt_BL.shape[1] :]))
    if run.metrics is not None:
        run.metrics.sample(run.step, prompt, text)
    return text


def fork_rng(run: Run) -> Any:
    """A context in which random numbers may be drawn that training does not miss."""
    import torch

    return torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else [])
