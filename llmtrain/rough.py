"""A rough stand-in for the trace of a model that cannot be traced: closed formulas."""

from typing import TYPE_CHECKING

from llmtrain.model.facts import Facts
from llmtrain.trace import PHASES, Sample, Setting, Trace, Weights

if TYPE_CHECKING:
    from llmtrain.config import RunConfig

MARGIN = 1.3  # activations of a class that nobody has measured


def rough_trace(config: "RunConfig", setting: Setting, doubt: str) -> Trace:
    """Activations by formula, with a margin; it is marked with why."""
    facts: Facts = config.model.facts(config.cache)
    width = 4 if setting.dtype == "float32" else 2
    tokens = config.train.seq_len
    kept = MARGIN * width / 2 * tokens * activations(facts, setting)
    most = kept + MARGIN * 3.0 * width * tokens * facts.vocab_size
    num_trainable = config.adapter.num_trainable(facts)
    frozen = facts.num_parameters if config.adapter.freezes else 0
    gradients = width * num_trainable
    frozen_bytes = frozen * (config.adapter.weight_bytes or width)
    weights = Weights(
        num_trainable=num_trainable,
        largest=min(num_trainable, facts.vocab_size * facts.width),
        num_frozen=frozen,
        num_tensors=10 * facts.num_layers,
        num_hidden=num_trainable,
        matrices=[],
        frozen_bytes=frozen_bytes,
        buffer_bytes=0.0,
        teacher_bytes=0.0,
        trained_sizes=[[num_trainable, 1]],
        frozen_sizes=[[int(frozen_bytes), 1]],
    )
    peaks = dict.fromkeys(PHASES, (most, most + gradients))
    return Trace(1, weights, (Sample(1, 1, peaks, kept, []),), " ".join(doubt.split())[:200])


def activations(facts: Facts, setting: Setting) -> float:
    """Bytes a token kept for the backward pass in 16 bits.

    A Llama layer keeps about (12 + 4g)h + 6f (g: share of key-value heads, h: width, f: feed-
    forward), a fused Mamba layer about 18h, a recomputed layer its input, 2h.
    """
    share = facts.kv_width / facts.attention_width if facts.attention_width else 0
    dense = (12 + 4 * share) * facts.width + 6 * facts.feed_forward
    layer = dense if facts.num_attention_layers else 18.0 * facts.width
    if setting.recompute == "none":
        return layer * facts.num_layers
    return 2.0 * facts.width * facts.num_layers + layer
