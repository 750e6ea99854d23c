"""How a run is spread over devices and memories: the fastest of the layouts that fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmtrain.buffers import bucket_elements
from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine
from llmtrain.memory import Account, Layout, Memory, measure
from llmtrain.trace import Trace

MOST_MICRO_TOKENS = {"cpu": 2048, "cuda": 32768}  # beyond, a larger micro-batch is no faster
MOST_BF16_ACCUMULATION = 8  # micro-batches that bf16 gradients may add up without losing the last
CLEARLY_FASTER = 0.95  # a prediction that is closer than that decides nothing
CLEARLY_FASTER_MICRO_BATCH = 0.8  # of smaller ones, whose many small costs are foreseen worst
CPU_SHARE = 0.9  # of a machine's memory that its ranks may take: the rest is the system's

Reasons = dict[str, str]
Spread = tuple[int, str, str]  # ZeRO stage, where the optimizer's state is, where the weights are

SPREADS: list[Spread] = [
    (0, "none", "none"),
    (1, "none", "none"),
    (2, "none", "none"),
    (3, "none", "none"),
    (2, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
    (3, "nvme", "cpu"),
    (3, "nvme", "nvme"),
]


@dataclass(frozen=True)
class Candidate:
    """A layout with what it takes: ``seconds`` a step where the machine's rates are known."""

    layout: Layout
    memory: Memory
    seconds: float | None
    refusal: str | None

    @property
    def fits(self) -> bool:
        return self.refusal is None


@dataclass(frozen=True)
class Problem:
    """What a layout is sought for.

    ``trace_of`` gives the trace under a way of recomputing, ``seconds_of`` a step's time.
    """

    config: RunConfig
    machine: Machine
    precision: str
    attention: str
    trace_of: Callable[[str], Trace]
    seconds_of: Callable[[Layout, Trace], float | None]

    def candidate(self, layout: Layout) -> Candidate:
        """What a layout takes, and why it is refused, if it is."""
        trace = self.trace_of(layout.activation_checkpointing)
        memory = measure(self.account(layout, trace), self.machine.device)
        refusal = lack(memory, self.machine)
        return Candidate(layout, memory, self.seconds_of(layout, trace), refusal)

    def account(self, layout: Layout, trace: Trace) -> Account:
        optimizer = self.config.optimizer
        on_host = self.machine.device == "cpu" or layout.offload_optimizer != "none"
        state_bytes = optimizer.bytes_of_state(trace.weights, on_host)
        if layout.precision == "bf16_pure" and optimizer.state_follows_weights:
            state_bytes /= 2
        return Account(
            trace,
            layout,
            grad_accum=accumulation(self.config, layout),
            optimizer_bytes=state_bytes,
            accumulates_in_fp32=accumulates_in_fp32(layout, optimizer.whole_gradients),
            whole_gradients=optimizer.whole_gradients,
            bucket=bucket_elements(trace.weights.num_trainable),
        )


def choose_layout(problem: Problem, reasons: Reasons) -> list[Candidate]:
    """ZeRO stage, offload, recomputation and micro-batch: all candidates, the chosen one first.

    What is asked for is taken as it is. Of what is left the fastest that fits is chosen; between
    two that are about as fast, the one that does less (a lower stage, no recomputation). Where
    nothing fits, the most frugal stands first. Behind it come the best of each other way to spread.
    """
    config, machine = problem.config, problem.machine
    micro_batches = possible_micro_batches(config, machine)
    spreads = possible_zero(config, machine, problem.precision, reasons)
    ways = [
        (spread, recompute) for spread in spreads for recompute in possible_recomputation(config)
    ]
    best = [best_of_way(problem, *way, micro_batches) for way in ways]
    exact = [one for one in best if not loses_gradients(config, one.layout)] or best
    chosen = choose(exact)
    explain_layout(config, chosen, micro_batches, reasons)
    rest = sorted((one for one in best if one is not chosen), key=rank_of)
    return [chosen, *rest]


def best_of_spread(
    problem: Problem, spread: Spread, micro_batches: list[int]
) -> Iterator[Candidate]:
    """The best with each way to recompute; what recomputes can only gain by a larger batch."""
    for recompute in possible_recomputation(problem.config):
        found = best_of_way(problem, spread, recompute, micro_batches)
        yield found
        if found.fits and found.layout.micro_batch == micro_batches[0]:
            return


def best_of_way(
    problem: Problem, spread: Spread, recompute: str, micro_batches: list[int]
) -> Candidate:
    """The best micro-batch of one way to spread and to recompute."""
    stage, optimizer, params = spread
    base = Layout(
        precision=problem.precision,
        zero_stage=stage,
        offload_optimizer=optimizer,
        offload_params=params,
        activation_checkpointing=recompute,
        attention=problem.attention,
        world_size=problem.machine.world_size,
        micro_batch=1,
        seq_len=problem.config.train.seq_len,
    )
    candidates = [problem.candidate(replace(base, micro_batch=size)) for size in micro_batches]
    return choose(candidates, CLEARLY_FASTER_MICRO_BATCH)


def choose(candidates: list[Candidate], clearly: float = CLEARLY_FASTER) -> Candidate:
    """The first that fits, unless a later one is clearly faster; the smallest where none fits."""
    fitting = [one for one in candidates if one.fits]
    if not fitting:
        return min(candidates, key=lambda one: one.memory.device_peak_gib)
    best = fitting[0]
    for one in fitting[1:]:
        if one.seconds is not None and best.seconds is not None:
            best = one if one.seconds < clearly * best.seconds else best
    return best


def rank_of(candidate: Candidate) -> tuple[bool, float]:
    """What fits before what does not, the faster first."""
    seconds = candidate.seconds if candidate.seconds is not None else 0.0
    return not candidate.fits, seconds if candidate.fits else candidate.memory.device_peak_gib


def lack(memory: Memory, machine: Machine) -> str | None:
    """What a layout needs more of than there is; None where it fits."""
    if machine.device == "cpu":
        needed, there = memory.device_peak_gib, CPU_SHARE * machine.memory_gib
        return f"{needed:.1f} GiB a rank of {there:.1f}" if needed > there else None
    needed = memory.device_peak_gib + memory.reserved_gib
    if needed > machine.memory_gib:
        return f"{needed:.1f} GiB on a device of {machine.memory_gib:.1f}"
    on_host, there = (
        memory.host_peak_gib * machine.gpus_per_node,
        CPU_SHARE * machine.host_memory_gib,
    )
    if on_host > there:
        return f"{on_host:.1f} GiB on a host with {there:.1f} for it"
    return None


def accumulation(config: RunConfig, layout: Layout) -> int:
    """Micro-batches of a rank in one step."""
    return config.train.global_batch // (layout.world_size * layout.micro_batch)


def loses_gradients(config: RunConfig, layout: Layout) -> bool:
    """Whether a stage that nobody asked for would add up many micro-batches in bf16."""
    is_bf16 = layout.precision.startswith("bf16") and not accumulates_in_fp32(
        layout, config.optimizer.whole_gradients
    )
    many = accumulation(config, layout) > MOST_BF16_ACCUMULATION
    return config.zero.stage is None and is_bf16 and many


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
        return [spread for spread in found if is_sensible(spread, machine, zero.nvme_path)]
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


def is_sensible(spread: Spread, machine: Machine, nvme_path: str | None) -> bool:
    """Whether a spread can be worth trying where nothing was asked."""
    stage, where, _ = spread
    if "nvme" in spread and nvme_path is None:
        return False  # it is not known where such a disk is
    if machine.device == "cpu" and where != "none":
        return False  # the device's memory is the host's
    return not (machine.world_size == 1 and stage == 3 and where == "none")  # nothing to partition


def completed(stage: int | None, optimizer: str | None, params: str | None) -> Spread:
    """What was asked, with the smallest stage that can do it."""
    if stage is None:
        stage = 3 if params not in (None, "none") or optimizer == "nvme" else 1
    return stage, optimizer or "none", params or "none"


def possible_recomputation(config: RunConfig) -> list[str]:
    asked = config.train.activation_checkpointing
    return [asked] if asked is not None else ["none", "full"]


def explain_layout(
    config: RunConfig, chosen: Candidate, micro_batches: list[int], reasons: Reasons
) -> None:
    """Why this layout was taken."""
    layout = chosen.layout
    if not chosen.fits:
        least = "nothing fits: this takes the least"
        reasons |= dict.fromkeys(("micro_batch", "activation_checkpointing"), least)
        reasons.setdefault("zero_stage", least)
        return
    if "zero_stage" not in reasons:
        offloaded = layout.offload_optimizer != "none"
        smaller = "its state does not fit the device: the optimizer goes to the host"
        if layout.offload_params != "none":
            offloaded, smaller = True, "the fastest that fits: the weights go to the host"
        best = "the fastest that fits, or the least of those about as fast"
        exact = "many micro-batches are added up in fp32"
        alone = exact if layout.zero_stage else "one rank has nothing to partition"
        reasons["zero_stage"] = smaller if offloaded else alone if layout.world_size == 1 else best
    if config.train.micro_batch is not None:
        reasons["micro_batch"] = "asked for"
    elif layout.micro_batch == micro_batches[0]:
        reasons["micro_batch"] = "a larger one is too much, no faster or does not divide the batch"
    else:
        reasons["micro_batch"] = "the fastest that fits"
    if config.train.activation_checkpointing is not None:
        reasons["activation_checkpointing"] = "asked for"
    elif layout.activation_checkpointing == "none":
        reasons["activation_checkpointing"] = "activations fit"
    else:
        reasons["activation_checkpointing"] = "faster than what else would make activations fit"
