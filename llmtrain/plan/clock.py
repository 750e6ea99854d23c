"""A step's time, for a machine whose rates are known."""

from collections.abc import Callable

from llmtrain.config import RunConfig
from llmtrain.hardware import Machine
from llmtrain.layout import accumulation
from llmtrain.memory import Layout
from llmtrain.rates import rates_of
from llmtrain.roofline import StepWork, Work, step_seconds, work_of
from llmtrain.trace import Sample, Trace


def clock(config: RunConfig, machine: Machine) -> Callable[[Layout, Trace], float | None]:
    """A function that gives a step's seconds; None where the machine's rates are not known."""
    rates = rates_of(machine, config.cache)
    if rates is None:
        return lambda layout, trace: None
    known: dict[int, Work] = {}

    def work(sample: Sample) -> Work:
        if id(sample) not in known:
            known[id(sample)] = work_of(sample.ops, rates)
        return known[id(sample)]

    def seconds(layout: Layout, trace: Trace) -> float | None:
        if trace.doubt is not None:
            return None
        micro = Work(
            trace.at(layout.micro_batch, lambda sample: work(sample).device),
            trace.at(layout.micro_batch, lambda sample: work(sample).host),
        )
        return step_seconds(micro.seconds(rates), step_of(config, layout, trace), rates)

    return seconds


def step_of(config: RunConfig, layout: Layout, trace: Trace) -> StepWork:
    """What a step does beside forward and backward."""
    weights, optimizer = trace.weights, config.optimizer
    on_host = layout.offload_optimizer != "none"
    return StepWork(
        grad_accum=accumulation(config, layout),
        world_size=layout.world_size,
        zero_stage=layout.zero_stage,
        offload_optimizer=layout.offload_optimizer,
        offload_params=layout.offload_params,
        num_trainable=weights.num_trainable,
        num_weights=weights.num_trainable + weights.num_frozen,
        num_tensors=weights.num_tensors,
        weight_bytes=4 if layout.precision == "fp32" else 2,
        has_master=layout.precision in ("bf16", "fp16"),
        state_bytes=optimizer.bytes_of_state(weights, on_host) / weights.num_trainable,
        hidden=tuple((rows, columns) for rows, columns in weights.matrices)
        if optimizer.whole_gradients
        else (),
    )
