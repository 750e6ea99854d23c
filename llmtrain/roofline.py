"""Seconds of a step: what its operations are, added up at the rates of a machine."""

# B batch, H heads, L length, D width of a head

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.hardware import Machine
from llmtrain.rates import CPU_BLOCK, KINDS, VIEW_SHARE, Rates, dtype_key, num_blocks

if TYPE_CHECKING:
    from torch import Tensor
    from torch._ops import OpOverload

VIEWS = {"_unsafe_view", "empty", "new_empty", "empty_like", "empty_strided", "lift_fresh"}
READ_IN_PART = ("embedding", "gather", "index", "index_select")  # as much as comes out
WRITTEN_IN_PART = ("scatter_", "scatter_add_", "index_add_", "index_put_")  # as much as goes in
GPU_BLOCK = 128  # keys of a block of scores in FlashAttention-2

Size = tuple[float, float]  # FLOPs and bytes


class Row(NamedTuple):
    """Operations alike: what they cost like, in which dtype, FLOPs and bytes of one, how many."""

    kind: str
    dtype: str
    flops: float
    num_bytes: float
    times: float


class OpCounter:
    """Writes down what each dispatched operation costs; its tensors may be fake."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, float, float]] = Counter()
        self.readers: dict[OpOverload, Reader] = {}

    def see(
        self, func: "OpOverload", args: Any, kwargs: dict[str, Any], out: Any, times: int = 1
    ) -> None:
        """Count calls of an aten operation with its arguments and what it returned."""
        reader = self.readers.get(func)
        if reader is None:
            reader = self.readers[func] = reader_of(func)
        self.counts[reader(args, kwargs, out)] += times

    def rows(self) -> list[Row]:
        """What was seen, equal operations as one row; a row is a list in JSON."""
        return [Row(*key, times) for key, times in self.counts.items() if key[0] != "nothing"]


Reader = Callable[[Any, dict[str, Any], Any], tuple[str, str, float, float]]


def reader_of(func: "OpOverload") -> Reader:
    """What reads the cost of an operation off its arguments."""
    name = func._opname
    if func.namespace == "prim":  # questions such as a tensor's device, asked under tracing only
        return lambda args, kwargs, out: ("nothing", "", 0.0, 0.0)
    if func.is_view or name in VIEWS:
        return lambda args, kwargs, out: ("view", "", 0.0, 0.0)
    if "attention" in name:
        return attention_reader(func)
    if name in PRODUCTS:
        return product_reader(PRODUCTS[name])
    if name == "_grouped_mm":
        return read_grouped
    if name in SCANNERS:
        return scan_reader(func, SCANNERS[name])
    return elementwise_reader(name)


def product_reader(flops_of: Callable[[Any, Any], float]) -> Reader:
    def read(args: Any, kwargs: dict[str, Any], out: Any) -> tuple[str, str, float, float]:
        factors = [arg for arg in args if is_tensor(arg) and arg.dim() > 1]
        num_bytes = sum(map(bytes_of, factors)) + bytes_of(out)
        kind = "matvec" if 1 in (factors[-2].shape[-2], out.shape[-1]) else "product"
        return kind, dtype_key(factors[0].dtype), flops_of(factors, out), num_bytes

    return read


def product_flops(factors: Any, out: Any) -> float:
    """2 for each output and each term of its sum: [.., M, K] x [.., K, N], with a bias before."""
    return 2.0 * out.numel() * factors[-2].shape[-1]


PRODUCTS: dict[str, Callable[[Any, Any], float]] = {
    "mm": product_flops,
    "addmm": product_flops,
    "bmm": product_flops,
    "baddbmm": product_flops,
}


def read_grouped(args: Any, kwargs: dict[str, Any], out: Any) -> tuple[str, str, float, float]:
    """Of rows dealt to experts: each meets one expert's matrix, or is summed in one's gradient.

    In the place of bytes the number of experts, each of which is a product of its own on a CPU.
    """
    rows, columns = args[:2]
    experts = max(factor.shape[0] if factor.dim() == 3 else 1 for factor in (rows, columns, out))
    flops = 2.0 * rows.shape[-2] * rows.shape[-1] * columns.shape[-1]
    return "grouped", dtype_key(rows.dtype), flops, float(experts)


# Operators whose states stay in cache -> their kind.
SCANNERS = {
    "compiled_scan": "scan",
    "compiled_scan_backward": "scan_backward",
    "compiled_heads": "heads",
    "compiled_heads_backward": "heads_backward",
}


def scan_reader(func: "OpOverload", kind: str) -> Reader:
    """Of a compiled scan: instead of FLOPs the states that it walks."""
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("x_BDL")
    of_states = names.index("B_BLN" if "B_BLN" in names else "B_BLGN")

    def read(args: Any, kwargs: dict[str, Any], out: Any) -> tuple[str, str, float, float]:
        num_states = args[of_states].shape[-1]
        return kind, "fp32", float(args[place].numel() * num_states), 0.0

    return read


def attention_reader(func: "OpOverload") -> Reader:
    """Of fused attention: FLOPs of its products, and instead of bytes its blocks of scores."""
    place = {argument.name: number for number, argument in enumerate(func._schema.arguments)}
    is_backward = func._opname.endswith("_backward")
    kind = "attention_backward" if is_backward else "attention"
    block = CPU_BLOCK if "cpu" in func._opname else GPU_BLOCK

    def read(args: Any, kwargs: dict[str, Any], out: Any) -> tuple[str, str, float, float]:
        query, key, value = (args[place[name]] for name in ("query", "key", "value"))
        is_causal = named(place, args, kwargs, "is_causal")
        batch, heads, length, width = query.shape
        keys = mean_keys(length, key.shape[-2], block if is_causal else None)
        products = (3, 2) if is_backward else (1, 1)  # over the width of keys, of values
        terms = products[0] * width + products[1] * value.shape[-1]
        heads *= batch
        flops = 2.0 * heads * length * keys * terms
        return kind, dtype_key(query.dtype), flops, heads * num_blocks(length, keys)

    return read


def named(place: dict[str, int], args: Any, kwargs: dict[str, Any], name: str) -> Any:
    """An argument by its name, wherever it was given; None where it was not."""
    number = place.get(name, len(args))
    return args[number] if number < len(args) else kwargs.get(name)


def mean_keys(length: int, num_keys: int, block: int | None) -> float:
    """The keys that a query is multiplied with: of causal attention the blocks to the diagonal."""
    return float(num_keys) if block is None else min(float(num_keys), (length + block) / 2)


def elementwise_reader(name: str) -> Reader:
    """Of everything else: the bytes that go in and out."""
    kind = KINDS.get(name.strip("_"), "add")
    moved = MOVED.get(name, moved_whole)

    def read(args: Any, kwargs: dict[str, Any], out: Any) -> tuple[str, str, float, float]:
        inputs = [*tensors(args), *tensors(kwargs.values())]
        outputs = list(tensors([out]))
        found = kind
        if kind in ("add", "clone"):  # bound by their bytes
            outputs = [made for made in outputs if not any(made is given for given in inputs)]
            found = "transpose" if any(map(is_transposed, inputs)) else kind
        return found, widest([*inputs, *outputs]), 0.0, moved(inputs, outputs)

    return read


def moved_whole(inputs: list["Tensor"], outputs: list["Tensor"]) -> float:
    return float(sum(map(bytes_of, inputs)) + sum(map(bytes_of, outputs)))


def moved_out(inputs: list["Tensor"], outputs: list["Tensor"]) -> float:
    return 2.0 * sum(map(bytes_of, outputs))


def moved_in(inputs: list["Tensor"], outputs: list["Tensor"]) -> float:
    return 3.0 * bytes_of(inputs[-1])


MOVED = dict.fromkeys(READ_IN_PART, moved_out) | dict.fromkeys(WRITTEN_IN_PART, moved_in)


def tensors(values: Iterable[Any]) -> Iterator["Tensor"]:
    """The tensors among arguments, also those in a list of them."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from tensors(value)
        elif is_tensor(value):
            yield value


def is_tensor(value: Any) -> bool:
    return hasattr(value, "element_size")


def bytes_of(tensor: "Tensor") -> int:
    return tensor.numel() * tensor.element_size()


def is_transposed(tensor: "Tensor") -> bool:
    """Whether neighbours in the last dimension lie apart in memory."""
    return tensor.dim() > 1 and tensor.stride(-1) > 1 and tensor.shape[-1] > 1


def widest(found: list["Tensor"]) -> str:
    """The dtype of the arithmetic: 16 bits only where nothing floating is wider."""
    keys = {dtype_key(tensor.dtype) for tensor in found if tensor.is_floating_point()}
    return keys.pop() if len(keys) == 1 else "fp32"


def weighted(rows: Iterable[Row], weight: float) -> list[Row]:
    """Rows so many times: sums of these carry a small trace over to more layers or sequences."""
    return [Row(*row[:4], weight * row[4]) for row in rows]


class Work(NamedTuple):
    """Seconds of operations on the device, and of the host that launches them."""

    device: float
    host: float

    def seconds(self, rates: Rates) -> float:
        """Of both together: a GPU computes while the host launches what follows."""
        return max(self) if rates.is_asynchronous else sum(self)


def seconds_of(rows: Iterable[Row], rates: Rates) -> float:
    """Seconds of all operations."""
    return work_of(rows, rates).seconds(rates)


def work_of(rows: Iterable[Row], rates: Rates) -> Work:
    """Device and host apart: each grows evenly with layers and sequences, the longer does not."""
    device = host = 0.0
    for kind, dtype, flops, num_bytes, times in rows:
        if kind == "view":
            host += VIEW_SHARE * times * rates.host_seconds
        else:
            host += times * rates.host_seconds
            device += times * rates.seconds(kind, dtype, flops, num_bytes)
    return Work(device, host)


# DeepSpeed's own work, in operations on each trained tensor, by ZeRO stage: hooks, buckets, slices.
MICRO_OPERATIONS = {0: 0, 1: 3, 2: 10, 3: 55}
STEP_OPERATIONS = {0: 10, 1: 4, 2: 7, 3: 12}
FIXED_SECONDS = 0.004  # of a step: batches, records, the count of tokens over ranks
NEWTON_SCHULZ_STEPS = 5
BACKWARD_SHARE = 2 / 3  # of a micro-batch's time, under which a GPU's gradients travel


@dataclass(frozen=True)
class StepWork:
    """What a step does beside its micro-batches' operations: parameters and how they are spread.

    ``num_weights`` counts frozen ones, too; ``weight_bytes`` and ``state_bytes`` are of one
    parameter, ``hidden`` the shapes of the matrices that Muon makes orthogonal.
    """

    grad_accum: int
    world_size: int
    zero_stage: int
    offload_optimizer: str
    offload_params: str
    num_trainable: int
    num_weights: int
    num_tensors: int
    weight_bytes: int
    has_master: bool
    state_bytes: float
    hidden: tuple[tuple[int, int], ...] = ()

    @property
    def num_owned(self) -> float:
        """Parameters that this rank updates."""
        return self.num_trainable / (self.world_size if self.zero_stage else 1)


def step_seconds(micro_seconds: float, work: StepWork, rates: Rates) -> float:
    """Seconds of an optimizer step, from those of one micro-batch forward and backward."""
    each = work.num_tensors * rates.host_seconds
    hooks = seen(MICRO_OPERATIONS[work.zero_stage] * each, micro_seconds, rates)
    weights = seen(gathering(work, rates), micro_seconds, rates)
    micro = micro_seconds + hooks + weights + adding_up(work, rates)
    return (
        FIXED_SECONDS
        + STEP_OPERATIONS[work.zero_stage] * each
        + work.grad_accum * micro
        + reducing(work, rates, micro_seconds)
        + updating(work, rates)
    )


def seen(seconds: float, under: float, rates: Rates) -> float:
    """What is seen of something that a GPU has done while it computes for so long."""
    return max(0.0, seconds - under) if rates.is_asynchronous else seconds


def gathering(work: StepWork, rates: Rates) -> float:
    """Stage 3: the weights come twice, from the other ranks and from where they are offloaded."""
    if work.zero_stage < 3:
        return 0.0
    num_bytes = float(work.num_weights * work.weight_bytes)
    seconds = 2 * (between_ranks(work, rates, num_bytes / 2) + rates.moving("clone", 2 * num_bytes))
    return seconds + 2 * offloaded(work.offload_params, num_bytes / work.world_size, rates)


def adding_up(work: StepWork, rates: Rates) -> float:
    """The gradients of one micro-batch are added to those of the others."""
    into = work.weight_bytes if work.zero_stage == 0 or not work.has_master else 4
    num_bytes = work.num_owned * (work.weight_bytes + 2 * into)
    if work.zero_stage >= 2:  # through a bucket
        num_bytes += 2.0 * work.num_trainable * work.weight_bytes
    return rates.moving("clone", num_bytes)


def reducing(work: StepWork, rates: Rates, micro_seconds: float) -> float:
    """Gradients between ranks, from stage 2 on in each micro-batch, and on to the host.

    What goes to the host does so under the backward pass.
    """
    num_bytes = float(work.num_trainable * work.weight_bytes)
    times = work.grad_accum if work.zero_stage >= 2 else 1
    halves = 1 if work.zero_stage else 2  # an all-reduce is a reduction and a gathering
    seconds = times * between_ranks(work, rates, num_bytes * halves / 2)
    host = offloaded(work.offload_optimizer, num_bytes / work.world_size, rates)
    return seconds + times * seen(host, BACKWARD_SHARE * micro_seconds, rates)


def updating(work: StepWork, rates: Rates) -> float:
    """The optimizer over what this rank owns, and its new weights to where they are needed."""
    weights = work.num_owned * work.weight_bytes
    seconds = updated(work, rates) + orthogonal(work, rates)
    if work.has_master or work.zero_stage:  # to and from flat fp32 copies, which ZeRO always has
        seconds += rates.moving("clone", 2 * (weights + 4 * work.num_owned))
    seconds += rates.moving("clone", 12 * work.num_owned)  # their norm, and the clipping
    seconds += offloaded(work.offload_optimizer, weights, rates)
    if work.zero_stage in (1, 2):
        seconds += between_ranks(work, rates, work.num_trainable * work.weight_bytes / 2)
    return seconds


def updated(work: StepWork, rates: Rates) -> float:
    """An elementwise update: gradient in, weight and states in and out."""
    num_bytes = work.num_owned * (12 + 2 * work.state_bytes)
    if work.offload_optimizer == "none" or not rates.is_asynchronous:
        return rates.moving("adam", num_bytes)
    state = work.num_owned * (4 + work.state_bytes) if work.offload_optimizer == "nvme" else 0.0
    return max(rates.moving("host_adam", num_bytes), rates.moving("nvme", 2 * state))


def orthogonal(work: StepWork, rates: Rates) -> float:
    """Muon's Newton-Schulz steps, in bf16, each matrix on one rank (Jordan et al. 2024).

    A step multiplies X X', A A and B X, for X [short, long] and A, B [short, short].
    """
    seconds = 0.0
    for shape in work.hidden:
        short, long = sorted(shape)
        flops = 4.0 * short**2 * long + 2.0 * short**3
        num_bytes = 2.0 * (3 * short * long + 5 * short**2)
        seconds += rates.seconds("product", "bf16", flops, num_bytes)
    return NEWTON_SCHULZ_STEPS * seconds / work.world_size


def between_ranks(work: StepWork, rates: Rates, num_bytes: float) -> float:
    """An all-reduce of so many bytes; a reduction or a gathering alone takes half of one."""
    return rates.moving("all_reduce", num_bytes) if work.world_size > 1 else 0.0


def offloaded(where: str, num_bytes: float, rates: Rates) -> float:
    """One way between the device and the host; what lies on a disk passes through the host."""
    if where == "none":
        return 0.0
    return rates.moving("host_link" if rates.is_asynchronous else "clone", num_bytes)


class Cost(NamedTuple):
    """What a run takes; null where power or price is not known."""

    gpu_hours: float
    energy_kwh: float | None
    money: float | None


POWER_SHARE = 0.85  # of its rated power that a GPU draws on average in a training step


def cost_of(total_hours: float, machine: Machine) -> Cost:
    """GPU-hours, kWh of the devices alone, and money in the currency of ``price_per_hour``."""
    hours = total_hours * machine.world_size
    watts, price = machine.power_watts, machine.price_per_hour
    energy = None if watts is None else hours * POWER_SHARE * watts / 1000
    return Cost(hours, energy, None if price is None else hours * price)
