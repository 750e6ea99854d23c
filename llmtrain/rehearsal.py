"""What `launcher=dry` does in the place of training: the first batch, read and traced."""

from typing import TYPE_CHECKING

from llmtrain.config import RunConfig
from llmtrain.plan import Plan

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest

SHOWN_TOKENS = 48


def rehearse(config: RunConfig, plan: Plan, manifest: "Manifest") -> None:
    """Build the first micro-batch of the first rank and trace it; print what both gave."""
    from transformers import AutoTokenizer

    from llmtrain.data.order import rank_share
    from llmtrain.data.sequences import open_sequences
    from llmtrain.plan import setting_of
    from llmtrain.tracer import Tracer

    sequences = open_sequences(
        manifest,
        "train",
        plan.seq_len,
        keep_apart=plan.keep_documents_apart,
        packing=plan.packing,
    )
    order = sequences.order(config.seed, 0, plan.global_batch)
    first = next(iter(rank_share(order, 0, plan.world_size, plan.micro_batch)))
    batch = sequences.batch(first)
    shapes = ", ".join(f"{name} {list(values.shape)}" for name, values in batch.items())
    learned = (batch["labels"] >= 0).mean()
    print(f"\nThe first micro-batch: {shapes}; {learned:.0%} of its tokens are learned.")
    tokenizer = AutoTokenizer.from_pretrained(manifest.vocabulary.folder)
    print(f"It begins: {tokenizer.decode(batch['input_ids'][0][:SHOWN_TOKENS])!r}")
    tracer = Tracer(config, setting_of(plan))
    sample = tracer.sample(max(tracer.depth.traced), plan.micro_batch)
    num_ops = sum(int(row[-1]) for row in sample.ops)
    print(
        f"Traced forward and backward: {num_ops:,} operations in {sample.num_layers} of "
        f"{tracer.depth.num_layers} layers, and a gradient for each trained parameter."
    )
    print("Nothing was started: leave out launcher=dry to train.")
