"""Bytes per device, by component: what decides whether a run fits.

These are closed formulas for states and rough ones for activations; they choose the micro-batch
and the ZeRO stage with a margin.
"""

from dataclasses import dataclass

from llmtrain.model.facts import Facts

GIB = 2**30
MARGIN = 0.88  # of a device's memory: the rest is for the allocator, the context and temporaries


@dataclass(frozen=True)
class Layout:
    """How a run is spread: what memory depends on beside the model."""

    precision: str
    zero_stage: int
    offload_optimizer: str
    offload_params: str
    activation_checkpointing: str
    attention: str
    world_size: int
    micro_batch: int
    seq_len: int


@dataclass(frozen=True)
class Weights:
    """Parameters by what happens to them; bytes of what stays as it is."""

    num_trainable: int
    frozen_bytes: float = 0.0
    teacher_bytes: float = 0.0


@dataclass(frozen=True)
class Memory:
    """GiB by component on one device and, for its share, on the host."""

    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_peak_gib(self) -> float:
        return sum(self.device.values())

    @property
    def host_peak_gib(self) -> float:
        return sum(self.host.values())


def estimate(facts: Facts, layout: Layout, state_bytes: float, weights: Weights) -> Memory:
    """The components of a step's peak; ``state_bytes`` is the optimizer's state a parameter."""
    device = states(weights, layout, state_bytes)
    host = {}
    if layout.offload_optimizer != "none":
        host["optimizer"] = device.pop("optimizer") + device.pop("master")
    if layout.offload_params != "none":
        host["weights"] = device.pop("weights")
    device["activations"] = activations(facts, layout) / GIB
    device["logits"] = logits(facts, layout) / GIB
    if weights.teacher_bytes:
        device["teacher"] = weights.teacher_bytes / GIB  # whole on every device
    return Memory(device, host)


def states(weights: Weights, layout: Layout, state_bytes: float) -> dict[str, float]:
    """Weights, gradients, fp32 master copies and optimizer state, partitioned by the ZeRO stage.

    After Rajbhandari et al. 2020 (ZeRO, section 3.2).
    """
    weight = 4 if layout.precision == "fp32" else 2
    master = 4 if layout.precision in ("bf16", "fp16") else 0
    share = [1, 1, 1, 1]
    for level in range(layout.zero_stage):
        share[level] = layout.world_size
    optimizer_share, gradient_share, weight_share = share[0], share[1], share[2]
    count = weights.num_trainable / GIB
    frozen = weights.frozen_bytes / GIB
    if layout.precision == "bf16_pure":
        state_bytes /= 2  # the moments are bf16 like the weights
    accumulated = 4 if layout.precision == "bf16" and layout.zero_stage else 0
    return {
        "weights": (weight * count + frozen) / weight_share,
        "gradients": (weight + accumulated) * count / gradient_share,
        "master": master * count / optimizer_share,
        "optimizer": state_bytes * count / optimizer_share,
    }


def weights_of(
    facts: Facts,
    precision: str,
    num_trainable: int,
    frozen_weight_bytes: float | None,
    teacher: Facts | None,
) -> Weights:
    """What is trained and what is not; ``frozen_weight_bytes`` of a linear layer's, quantised."""
    width = 4 if precision == "fp32" else 2
    teacher_bytes = width * teacher.num_parameters if teacher is not None else 0
    if num_trainable == facts.num_parameters:
        return Weights(num_trainable, 0.0, teacher_bytes)
    linear = sum(inputs * outputs for inputs, outputs in facts.adaptable.values())
    in_linear = linear * (frozen_weight_bytes or width)
    return Weights(
        num_trainable, in_linear + width * (facts.num_parameters - linear), teacher_bytes
    )


def activations(facts: Facts, layout: Layout) -> float:
    """Bytes kept for the backward pass.

    A Llama layer keeps about (12 + 4g)h + 6f bytes a token in 16 bits (g: share of key-value heads,
    h: width, f: feed-forward), a fused Mamba layer about 18h, a recomputed layer its input, 2h.
    """
    tokens = layout.micro_batch * layout.seq_len
    scale = 2 if layout.precision == "fp32" else 1
    attending = facts.num_attention_layers
    share = facts.kv_width / facts.attention_width if facts.attention_width else 0
    dense = (12 + 4 * share) * facts.width + 6 * facts.feed_forward
    scores = 4 * facts.attention_width / 128 * layout.seq_len if layout.attention == "eager" else 0
    layer = dense + scores if attending else 18 * facts.width
    kept = layer * facts.num_layers
    if layout.activation_checkpointing == "full":
        kept = 2 * facts.width * facts.num_layers + layer
    elif layout.activation_checkpointing != "none":
        recomputed = facts.num_layers // int(layout.activation_checkpointing)
        kept = layer * (facts.num_layers - recomputed + 1) + 2 * facts.width * recomputed
    return scale * tokens * kept


def logits(facts: Facts, layout: Layout) -> float:
    """Bytes of the logits, their gradient and the gradient kept by the loss."""
    width = 4 if layout.precision == "fp32" else 2
    return 3.0 * width * layout.micro_batch * layout.seq_len * facts.vocab_size
