"""Bytes of a run at each of its moments, per device and on the host: what decides whether it fits.

Activations come from a trace of the real model (:mod:`llmtrain.trace`). States follow Rajbhandari
et al. 2020 (ZeRO, section 3.2); buffers are those that DeepSpeed 0.19 allocates, stage by stage.
"""

# P trained parameters, M the largest of them, R ranks, b bytes of a weight, s of optimizer state

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, log2

from launchers import blocks
from llmtrain.buffers import MOST_GATHERED, SWAPPED_GROUP
from llmtrain.trace import BEFORE_GRADIENTS, WITH_GRADIENTS, Trace

GIB = 2**30
COPIES = "copies to save"
FLAT_GRADIENTS = 5e8  # elements that stage 0 adds up between ranks at once
SUB_GROUP = 1e9  # elements that stage 3 steps at once
SWAP_BUFFERS = 4  # of a sub-group, through which state comes from a disk
WEIGHT_BUFFERS = 8  # of the largest weight, through which weights do

# What a rank's process takes on a CPU beside its tensors, imports left out: fitted to
# benchmarks.plan_accuracy. oneDNN keeps what it made for products in 16 bits (launchers.local).
PROCESS_GIB = 0.033
KERNELS_GIB = 0.024
HOLES_SHARE = 0.5  # of the tensors, in the heap of a machine without launchers.blocks
# What has to stay free on a GPU beside its tensors: CUDA's context with the libraries' workspaces,
# NCCL's channels, and what the allocator cannot use of its blocks. Chosen with care, not measured.
CONTEXT_GIB = 0.9
COMMUNICATION_GIB = 0.8
SLACK_SHARE = 0.04

Bytes = dict[str, float]


@dataclass(frozen=True)
class Layout:
    """How a run is spread: what memory and time depend on beside the model."""

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
class Memory:
    """GiB by component at the peak of one device and, for its share, on the host and on a disk.

    ``moment`` says when the device's peak is; ``live_gib`` is it without what the process takes
    beside its tensors, ``reserved_gib`` what has to stay free on a GPU beside them. A rank's part
    of a checkpoint is ``checkpoint_gib``; a copy of it, to be written while training goes on, takes
    ``copy_gib`` more than is counted.
    """

    device: dict[str, float]
    host: dict[str, float]
    moment: str
    live_gib: float
    reserved_gib: float = 0.0
    disk_gib: float = 0.0
    checkpoint_gib: float = 0.0
    copy_gib: float = 0.0

    def with_copy(self, device: str) -> "Memory":
        """With the copy of a checkpoint on the host, which on a CPU is the device."""
        copy = {COPIES: self.copy_gib} if self.copy_gib else {}
        if device == "cpu":
            return replace(self, device=self.device | copy, live_gib=self.live_gib + self.copy_gib)
        return replace(self, host=self.host | copy)

    @property
    def device_peak_gib(self) -> float:
        return sum(self.device.values())

    @property
    def host_peak_gib(self) -> float:
        return sum(self.host.values())


@dataclass(frozen=True)
class Account:
    """What one rank holds at each moment of a step, in bytes by component."""

    trace: Trace
    layout: Layout
    grad_accum: int
    optimizer_bytes: float  # of state, for all parameters, beside a master copy
    accumulates_in_fp32: bool
    whole_gradients: bool
    bucket: float  # elements of gradients that are reduced at once

    @cached_property
    def width(self) -> float:
        return 4.0 if self.layout.precision == "fp32" else 2.0

    @property
    def count(self) -> float:
        return float(self.trace.weights.num_trainable)

    @property
    def ranks(self) -> int:
        return self.layout.world_size

    @property
    def share(self) -> float:
        """One rank's part of what is partitioned."""
        return self.count / self.ranks

    @property
    def bucketed(self) -> float:
        """Elements that a bucket has in it when it is full."""
        return min(self.bucket, self.count)

    @property
    def is_alone(self) -> bool:
        return self.ranks == 1

    @property
    def offloads(self) -> bool:
        return self.layout.offload_optimizer != "none"

    @property
    def upcasts(self) -> bool:
        """Whether stage 1 runs in DeepSpeed's optimizer that holds whole fp32 gradients."""
        return self.layout.zero_stage == 1 and self.accumulates_in_fp32

    def moments(self) -> dict[str, Bytes]:
        """What is on the device, by moment."""
        always = self.always()
        at = {
            "forward pass": self.forward(),
            "backward pass": self.backward(),
            "reduction of gradients": self.reduction(),
            "optimizer step": self.step(),
        }
        found = {moment: added(always, found) for moment, found in at.items()}
        return {"building of the model": self.building(), **found}

    def building(self) -> Bytes:
        """Every rank has the whole model before stage 3 partitions it."""
        weights = self.trace.weights
        whole = self.width * self.count + weights.frozen_bytes + weights.buffer_bytes
        return {"weights": whole, "teacher": weights.teacher_bytes}

    def always(self) -> Bytes:
        """Weights, masters and states, and buffers that stay, on the device."""
        weights, layout = self.trace.weights, self.layout
        at_3 = layout.zero_stage == 3
        parts = self.ranks if at_3 else 1
        found = {
            "weights": (self.width * self.count + weights.frozen_bytes) / parts
            + weights.buffer_bytes,
            "teacher": weights.teacher_bytes,
        }
        if layout.offload_params != "none":
            found["weights"] = weights.buffer_bytes
        if not self.offloads:
            found |= {"master copies": self.masters(), "optimizer states": self.states()}
        if self.upcasts:
            found["gradients"] = 4 * self.count
        if layout.offload_optimizer == "cpu" and not at_3:  # a gradient on its way
            found["buckets"] = self.width * weights.largest
        if at_3:
            found["buckets"] = self.width * self.bucket
            if not self.offloads:
                found["gradients"] = self.gradient_width * self.share
        return found

    @property
    def gradient_width(self) -> float:
        """Bytes of a gradient that is kept between micro-batches from stage 2 on."""
        return 4.0 if self.accumulates_in_fp32 else self.width

    def masters(self) -> float:
        """fp32 copies of the weights; ZeRO keeps one of fp32 weights, too."""
        if self.layout.zero_stage == 0:
            return 4 * self.count if self.layout.precision in ("bf16", "fp16") else 0.0
        return 4 * self.share

    def states(self) -> float:
        """Of the optimizer, in one rank."""
        parts = 1 if self.layout.zero_stage == 0 else self.ranks
        return self.optimizer_bytes / parts

    def forward(self) -> Bytes:
        """Activations at the loss, and the gradients of earlier micro-batches."""
        found = self.activations(BEFORE_GRADIENTS, with_gradients=False)
        if self.layout.zero_stage == 1 and self.grad_accum > 1 and not self.upcasts:
            found["buckets"] = self.width * self.bucket  # held until the step's reduction
        return found

    def backward(self) -> Bytes:
        """Activations at their most, and the gradients that are there by then."""
        layout = self.layout
        is_first = layout.zero_stage < 2 and self.grad_accum == 1
        found = self.activations(WITH_GRADIENTS, with_gradients=is_first)
        if layout.zero_stage in (1, 2) and not self.upcasts:
            found["buckets"] = self.width * self.bucket
        if layout.zero_stage == 2 and self.bucket < self.count:
            found["gradients"] = self.kept_gradients()
        return found

    def activations(self, phases: tuple[str, ...], with_gradients: bool) -> Bytes:
        """The most that lives in some phases, beside what earlier micro-batches left."""
        layout, trace = self.layout, self.trace
        most = trace.peak(layout.micro_batch, phases, with_gradients)
        kept = min(trace.kept(layout.micro_batch), most)
        found = {"activations": kept, "loss and temporaries": most - kept}
        if self.grad_accum > 1 and layout.zero_stage < 2:
            found["gradients"] = self.width * self.count  # whole until the step
        if self.grad_accum > 1 and layout.zero_stage == 2:
            found["gradients"] = self.kept_gradients()
        if layout.zero_stage == 3:
            found["gathered weights"] = self.gathered()
        return found

    def kept_gradients(self) -> float:
        """A rank's own gradients at stage 2, on the device."""
        if self.offloads and not self.accumulates_in_fp32:
            return 0.0
        return self.gradient_width * self.share

    def gathered(self) -> float:
        """Whole weights at stage 3: few enough of them stay gathered from forward to backward."""
        layout, weights = self.layout, self.trace.weights
        if self.is_alone and layout.offload_params == "none":
            return 0.0
        frozen = weights.frozen_bytes / self.width
        return self.width * min(self.count + frozen, MOST_GATHERED)

    def reduction(self) -> Bytes:
        """The end of a micro-batch's backward pass: no activations, gradients on their way."""
        width, full, largest = self.width, self.bucketed, self.trace.weights.largest
        stage = self.layout.zero_stage
        if stage == 0:
            flat = width * min(self.count, FLAT_GRADIENTS + largest)
            return {"gradients": width * self.count, "buckets": flat}
        if self.upcasts:
            in_one = 3 * width if self.count <= FLAT_GRADIENTS else width
            return {"gradients": width * self.count, "buckets": in_one * self.count}
        joined = width * full * ((stage == 2 and self.accumulates_in_fp32) or not self.is_alone)
        if stage == 1:
            rest = max(self.share, self.count - full)
            return {"gradients": width * rest, "buckets": width * self.bucket + joined}
        if stage == 2:
            twice = 2 if self.grad_accum > 1 and not self.accumulates_in_fp32 else 1
            gradients = self.kept_gradients() * twice
            slices = 4 * min(largest, full) if self.accumulates_in_fp32 else 0.0
            buckets = width * self.bucket + joined + slices
            return {"gradients": gradients, "buckets": buckets}
        pieces = 4 * full / self.ranks if self.accumulates_in_fp32 else 0.0
        # Weights are released layer by layer on the way; about half of them are still there.
        return {"buckets": width * full + pieces, "gathered weights": self.gathered() / 2}

    def step(self) -> Bytes:
        """The optimizer's step, where gradients become fp32 and are measured."""
        width, largest = self.width, self.trace.weights.largest
        stage, is_16_bit = self.layout.zero_stage, self.layout.precision in ("bf16", "fp16")
        if self.offloads:
            return {}
        if stage == 0:
            upcast = 4 * self.count + 4 * largest if is_16_bit else 0.0
            return {"gradients": width * self.count + upcast}
        if self.upcasts:
            return {"gradients": width * self.count}
        if stage == 3:
            group = min(SUB_GROUP, self.share)
            cast = 0.0 if self.gradient_width == 4 else 4 * group
            return {"gradients": self.gradient_width * group + cast}
        norm = 8.0 * min(largest, self.share)
        if stage == 2 and self.accumulates_in_fp32:
            return {"gradients": 4 * self.share + norm}
        group = self.share  # that is made flat and fp32 at once
        if self.whole_gradients:
            group = self.trace.weights.num_hidden / self.ranks
            norm /= 2
        cast = 4 * group if is_16_bit else 0.0
        return {"gradients": width * (self.share + group) + cast + norm}

    def saved(self) -> float:
        """This rank's part of a checkpoint: masters and states."""
        parts = 1 if self.layout.zero_stage == 0 else self.ranks
        master = self.width if self.layout.precision == "bf16_pure" else 4.0
        return master * self.count / parts + self.states()

    @property
    def is_saved_from_device(self) -> bool:
        """Whether a checkpoint passes through copies on the host, whoever waits for it."""
        return self.layout.offload_optimizer != "cpu"

    def on_host(self, pins: bool) -> Bytes:
        """What is in the host's memory for this rank; one with GPUs ``pins`` what it sends."""
        held = pinned if pins else float
        group = min(self.share, SWAPPED_GROUP + self.trace.weights.largest / self.ranks)
        found: Bytes = {}
        if self.layout.offload_optimizer == "cpu":
            found = self.optimizer_on_host(held)
        elif self.layout.offload_optimizer == "nvme":
            found["swap buffers"] = SWAP_BUFFERS * 4 * group
            found["gradients"] = held(self.gradient_width * self.share) + 4 * self.share
        if self.layout.offload_params == "cpu":
            found["weights"] = self.weights_on_host(pins)
        elif self.layout.offload_params == "nvme":
            frozen = max((size for size, _ in self.trace.weights.frozen_sizes), default=0)
            largest = max(self.width * self.trace.weights.largest, frozen) / self.ranks
            buffers = WEIGHT_BUFFERS * largest + self.width * group
            found = added(found, {"swap buffers": buffers})
        return found

    def optimizer_on_host(self, held: Callable[[float], float]) -> Bytes:
        """Masters, states and gradients; ``held`` is what so many bytes of a buffer take."""
        share, found = self.share, {"optimizer states": self.states()}
        if self.layout.zero_stage == 3:
            size = SWAPPED_GROUP if self.layout.offload_params == "nvme" else SUB_GROUP
            groups, rest = divmod(share, size)
            found["master copies"] = 4 * share
            found["gradients"] = groups * held(4 * size) + held(4 * rest)
            return found | {"copies to send": held(self.gradient_width * share)}
        found["master copies"] = found["gradients"] = held(4 * share)
        if self.grad_accum > 1 and not self.accumulates_in_fp32:
            found["gradients"] += self.apart(self.width, held)
        sent = held(self.width * share) + held(self.width * self.trace.weights.largest)
        return found | {"copies to send": sent}

    def weights_on_host(self, pins: bool) -> float:
        """A rank's parts; pinned one by one, and those that are trained once more together."""
        if not pins:
            return (self.width * self.count + self.trace.weights.frozen_bytes) / self.ranks
        frozen = self.trace.weights.frozen_sizes
        parts = sum(times * pinned(size / self.ranks) for size, times in frozen)
        return parts + self.apart(self.width, pinned) + pinned(self.width * self.share)

    def apart(self, width: float, held: Callable[[float], float]) -> float:
        """What trained weights of some width take in a rank where each is a buffer of its own."""
        stage, sizes = self.layout.zero_stage, self.trace.weights.trained_sizes
        parts = self.ranks if stage == 3 else 1
        whole = sum(times * held(width * size / parts) for size, times in sizes)
        return whole / (self.ranks if stage in (1, 2) else 1)

    def copied(self) -> float:
        """Of a checkpoint on the host, on its way from a GPU: pinned tensor by tensor."""
        if self.offloads:
            return self.saved()
        return self.saved() * self.apart(4.0, pinned) / self.apart(4.0, float)

    def on_disk(self) -> float:
        """Bytes of this rank on an NVMe drive."""
        layout = self.layout
        found = 0.0
        if layout.offload_optimizer == "nvme":
            found += 8 * self.share + self.states()
        if layout.offload_params == "nvme":
            found += self.width * self.share
        return found


def pinned(num_bytes: float) -> float:
    """What a buffer of so many bytes takes in pinned memory: torch asks for powers of two."""
    return 2.0 ** ceil(log2(num_bytes)) if num_bytes else 0.0


def process_gib(account: Account, live_gib: float) -> float:
    """What a rank's process takes on a CPU beside its tensors."""
    kernels = KERNELS_GIB if account.layout.precision != "fp32" else 0.0
    return PROCESS_GIB + kernels + (0.0 if blocks.is_possible() else HOLES_SHARE * live_gib)


def added(one: Bytes, other: Bytes) -> Bytes:
    """The sums of two accounts, component by component."""
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def measure(account: Account, device: str) -> Memory:
    """The peak of a rank: of its tensors on a GPU, of its process on a CPU."""
    moments = account.moments()
    on_host = account.on_host(pins=device != "cpu")
    if device == "cpu":  # the device is the process, and so is the host
        moments = {name: added(found, on_host) for name, found in moments.items()}
    live = max(sum(found.values()) for found in moments.values()) / GIB
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    found = {name: value / GIB for name, value in moments[moment].items() if value}
    disk, saved = account.on_disk() / GIB, account.saved() / GIB
    if device == "cpu":
        found |= {"process": process_gib(account, live)}
        return Memory(found, {}, moment, live, 0.0, disk, saved, saved)
    if account.is_saved_from_device:
        on_host |= {COPIES: account.copied()}
    copy = 0.0 if account.is_saved_from_device else saved
    host = {name: value / GIB for name, value in on_host.items() if value}
    reserved = CONTEXT_GIB + SLACK_SHARE * live
    if account.layout.world_size > 1:
        reserved += COMMUNICATION_GIB
    return Memory(found, host, moment, live, reserved, disk, saved, copy)
