"""How a run is spread over devices and memories: the fastest of the layouts that fit."""

from typing import Any

from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine
from llmtrain.memory import MARGIN, Layout, Memory, Weights, estimate
from llmtrain.model.facts import Facts

MOST_MICRO_TOKENS = {"cpu": 2048, "cuda": 32768}  # beyond, a larger micro-batch is no faster
MOST_BF16_ACCUMULATION = 8  # micro-batches that bf16 gradients may add up without losing the last

Reasons = dict[str, str]
Spread = tuple[int, str, str]  # ZeRO stage, where the optimizer's state is, where the weights are

SPREADS: list[Spread] = [
    (0, "none", "none"),
    (1, "none", "none"),
    (2, "none", "none"),
    (3, "none", "none"),
    (2, "cpu", "none"),
    (1, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
]


def choose_layout(
    config: RunConfig,
    machine: Machine,
    facts: Facts,
    precision: str,
    attention: str,
    weights: Weights,
    reasons: Reasons,
) -> Layout:
    """ZeRO stage, offload, recomputation and micro-batch: the least that fits.

    What is asked for is taken as it is; of what is left, candidates are tried from the fastest to
    the most frugal.
    """
    micro_batches = possible_micro_batches(config, machine)
    candidates = [
        Layout(
            precision=precision,
            zero_stage=stage,
            offload_optimizer=optimizer,
            offload_params=params,
            activation_checkpointing=recompute,
            attention=attention,
            world_size=machine.world_size,
            micro_batch=micro_batch,
            seq_len=config.train.seq_len,
        )
        for stage, optimizer, params in possible_zero(config, machine, precision, reasons)
        for recompute in possible_recomputation(config)
        for micro_batch in micro_batches
    ]
    state_bytes = config.optimizer.state_bytes
    fitting = [c for c in candidates if fits(estimate(facts, c, state_bytes, weights), machine)]
    exact = [c for c in fitting if not loses_gradients(config, c)]
    chosen = (exact or fitting or candidates[-1:])[0]
    explain_layout(config, chosen, micro_batches, reasons)
    return chosen


def loses_gradients(config: RunConfig, layout: Layout) -> bool:
    """Whether a stage that nobody asked for would add up many micro-batches in bf16."""
    grad_accum = config.train.global_batch // (layout.world_size * layout.micro_batch)
    is_bf16 = layout.precision.startswith("bf16") and not accumulates_in_fp32(
        layout, config.optimizer.whole_gradients
    )
    return config.zero.stage is None and is_bf16 and grad_accum > MOST_BF16_ACCUMULATION


def accumulates_in_fp32(layout: Layout, whole_gradients: bool) -> bool:
    """DeepSpeed adds bf16 gradients up in fp32 from stage 2 on.

    At stage 1 it does so in an optimizer that knows flat gradients only, and never at stage 0.
    """
    least = 2 if whole_gradients else 1
    return layout.precision == "bf16" and layout.zero_stage >= least


def possible_micro_batches(config: RunConfig, machine: Machine) -> list[int]:
    """Micro-batches that divide a rank's share of the global batch, largest first.

    Raises ConfigError where the arithmetic cannot come out.
    """
    batch, world = config.train.global_batch, machine.world_size
    asked = config.train.micro_batch
    unit = world * (asked or 1)
    if batch % unit:
        below, above = batch // unit * unit, -(-batch // unit) * unit
        reason = f"is not a multiple of {world} ranks x micro_batch {asked or 1} = {unit}"
        nearest = f"nearest are {below} and {above}" if below else f"nearest is {above}"
        raise ConfigError("train.global_batch", batch, reason, nearest)
    if asked is not None:
        return [asked]
    share = batch // world
    most = max(1, MOST_MICRO_TOKENS[machine.device] // config.train.seq_len)
    return [size for size in range(min(share, most), 0, -1) if share % size == 0]


def possible_zero(
    config: RunConfig, machine: Machine, precision: str, reasons: Reasons
) -> list[Spread]:
    """What fits what was asked and works with the optimizer, from fast to frugal."""
    zero, optimizer = config.zero, config.optimizer
    optimizer_on = zero.offload_optimizer.value if zero.offload_optimizer else None
    params_on = zero.offload_params.value if zero.offload_params else None
    asked = (zero.stage, optimizer_on, params_on)
    found = [spread for spread in SPREADS if matches(spread, asked) and works(spread, optimizer)]
    if precision == "bf16_pure":
        found = [spread for spread in found if spread[0] == 0]  # the other stages keep masters
        if not found:
            remedy = "take stage 0, or train.precision=bf16"
            raise ConfigError(
                "zero.stage", zero.stage, "keeps fp32 masters, which bf16_pure has not", remedy
            )
    if asked == (None, None, None):
        return [spread for spread in found if is_sensible(spread, machine)]
    reasons["zero_stage"] = "asked for"
    if machine.device == "cpu" and asked[1:] == (None, None):
        found = [spread for spread in found if spread[1] == "none"]  # it is on the host already
    return found or [completed(zero.stage, optimizer_on, params_on)]


def matches(spread: Spread, asked: tuple[Any, ...]) -> bool:
    return all(want is None or have == want for have, want in zip(spread, asked, strict=True))


def works(spread: Spread, optimizer: Any) -> bool:
    """Whether an optimizer's mathematics stays what it is when it is spread so."""
    stage, where, _ = spread
    return stage in optimizer.stages and (optimizer.offloads or where == "none")


def is_sensible(spread: Spread, machine: Machine) -> bool:
    """Whether a spread can be worth trying where nothing was asked."""
    stage, where, _ = spread
    if machine.device == "cpu" and where != "none":
        return False  # the device's memory is the host's
    return not (machine.world_size == 1 and stage == 3 and where == "none")  # nothing to partition


def completed(stage: int | None, optimizer: str | None, params: str | None) -> Spread:
    """What was asked, with the smallest stage that can do it."""
    if stage is None:
        stage = 3 if params not in (None, "none") else 1
    return stage, optimizer or "none", params or "none"


def possible_recomputation(config: RunConfig) -> list[str]:
    asked = config.train.activation_checkpointing
    return [asked] if asked is not None else ["none", "full"]


def explain_layout(
    config: RunConfig, layout: Layout, micro_batches: list[int], reasons: Reasons
) -> None:
    """Why this layout was taken."""
    if "zero_stage" not in reasons:
        offloaded = layout.offload_optimizer != "none"
        smaller = "the optimizer goes to the host: its state does not fit the device"
        least = "the smallest stage whose state fits the device"
        exact = "many micro-batches are added up in fp32"
        alone = exact if layout.zero_stage else "one rank has nothing to partition"
        reasons["zero_stage"] = smaller if offloaded else alone if layout.world_size == 1 else least
    if config.train.micro_batch is not None:
        reasons["micro_batch"] = "asked for"
    elif layout.micro_batch == micro_batches[0]:
        reasons["micro_batch"] = "a larger one would be no faster or does not divide the batch"
    else:
        reasons["micro_batch"] = "the largest that fits"
    recompute = config.train.activation_checkpointing
    if recompute is not None:
        reasons["activation_checkpointing"] = "asked for"
    elif layout.activation_checkpointing == "none":
        reasons["activation_checkpointing"] = "activations fit"
    else:
        reasons["activation_checkpointing"] = "activations do not fit without"


def fits(memory: Memory, machine: Machine) -> bool:
    """Whether a layout's peak leaves the margin on the device and on the host."""
    host = memory.host_peak_gib * machine.gpus_per_node
    if machine.device == "cpu":
        return memory.device_peak_gib <= MARGIN * machine.memory_gib
    on_device = memory.device_peak_gib <= MARGIN * machine.memory_gib
    return on_device and host <= MARGIN * machine.host_memory_gib
