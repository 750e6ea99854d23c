"""A plan as DeepSpeed's dictionary: a pure function."""

from pathlib import Path
from typing import Any

from llmtrain import buffers
from llmtrain.errors import ConfigError
from llmtrain.plan import Plan

SWAP_BUFFERS = 8  # weights that one module may use at once
SIZES = {  # of buffers: a user may know better
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
}
OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_params"}
OURS_ALONE = {"bf16", "fp16", "optimizer", "scheduler", "train_batch_size"}


def deepspeed_config(
    plan: Plan, extra: dict[str, Any], largest_parameter: int = 0
) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``, with a user's further keys merged into it.

    ``largest_parameter`` is the number of its elements; weights on a disk are read into buffers of
    its size. Raises ConfigError for a further key that a plan already decides.
    """
    ours = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": plan.grad_clip,
        "steps_per_print": 2**31,  # the run folder holds the metrics
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_optimization(plan, largest_parameter),
        **precision(plan),
    }
    for name in OURS_ALONE & set(extra):
        reason = "is decided by train.precision, optimizer and schedule"
        raise ConfigError(f"zero.extra.{name}", extra[name], reason, "leave it out")
    whole = merged(ours, extra, "zero.extra")
    check_offload(ours["zero_optimization"], whole["zero_optimization"])
    return whole


def check_offload(planned: dict[str, Any], whole: dict[str, Any]) -> None:
    """Raise ConfigError for an offload that no plan has counted with."""
    for name, key in OFFLOADS.items():
        if name in whole and name not in planned:
            remedy = f"ask for it by zero.{key}=cpu or nvme"
            reason = "is not what was planned"
            raise ConfigError(f"zero.extra.zero_optimization.{name}", whole[name], reason, remedy)


def zero_optimization(plan: Plan, largest_parameter: int) -> dict[str, Any]:
    """The block that spreads states over ranks and memories."""
    bucket = buffers.bucket_elements(plan.num_trainable_parameters)
    block: dict[str, Any] = {
        "stage": plan.zero_stage,
        "reduce_scatter": plan.reduce_scatter,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if plan.offload_optimizer != "none":
        block["offload_optimizer"] = offload(plan, plan.offload_optimizer)
    if plan.zero_stage == 3:
        block |= partitioned_weights(plan)
    if plan.offload_params != "none":
        block["offload_param"] = offload(plan, plan.offload_params)
    if plan.offload_params == "nvme":
        share = -(-largest_parameter // plan.world_size)
        block["offload_param"] |= swapped_weights(share)
    return block


def offload(plan: Plan, device: str) -> dict[str, Any]:
    """Where one kind of state goes; runs that share a disk do not share files."""
    if device == "nvme":
        return {"device": "nvme", "nvme_path": str(swap_folder(plan)), "pin_memory": True}
    return {"device": "cpu", "pin_memory": True}


def swap_folder(plan: Plan) -> Path:
    """Where a run's swapped state lies while it trains."""
    return Path(plan.nvme_path or ".").expanduser() / f"{plan.name}.swap"


def partitioned_weights(plan: Plan) -> dict[str, Any]:
    """How much of the weights stage 3 holds at a time.

    Of weights on a disk each that is held takes one of few buffers, so they are let go at once and
    none is read ahead: DeepSpeed would give one that is used twice two of them, and stop.
    """
    is_swapped = plan.offload_params == "nvme"
    sizes = {
        "stage3_prefetch_bucket_size": 0 if is_swapped else buffers.MOST_PREFETCHED,
        "stage3_param_persistence_threshold": buffers.MOST_PERSISTENT,
        "stage3_max_live_parameters": buffers.MOST_GATHERED,
        "stage3_max_reuse_distance": 0 if is_swapped else buffers.MOST_GATHERED,
        "memory_efficient_linear": False,  # it keeps other tensors than those that are planned
    }
    swaps = "nvme" in (plan.offload_optimizer, plan.offload_params)
    return sizes | ({"sub_group_size": buffers.SWAPPED_GROUP} if swaps else {})


def swapped_weights(largest_share: int) -> dict[str, Any]:
    """The buffers that weights on a disk are read into, and that no weights stay on the host."""
    return {"buffer_size": largest_share, "buffer_count": SWAP_BUFFERS, "max_in_cpu": 0}


def precision(plan: Plan) -> dict[str, Any]:
    """The blocks for 16-bit training with fp32 masters; fp32 and bf16_pure need none."""
    if plan.precision == "fp16":
        return {"fp16": {"enabled": True, "initial_scale_power": 16}}
    if plan.precision == "bf16":
        block: dict[str, Any] = {"bf16": {"enabled": True}}
        if plan.has_fp32_accumulation:
            block["data_types"] = {"grad_accum_dtype": "fp32"}
        return block
    return {}


def merged(ours: dict[str, Any], extra: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Two nested dictionaries as one, sizes of buffers from the second.

    Raises ConfigError where both hold another value for one key.
    """
    result = dict(ours)
    for name, value in extra.items():
        key = f"{prefix}.{name}"
        if isinstance(value, dict) and isinstance(ours.get(name), dict):
            result[name] = merged(ours[name], value, key)
        elif name in ours and name not in SIZES:
            remedy = "leave it out: train.*, zero.* and checkpoint.* decide it"
            raise ConfigError(key, value, f"stands against the plan's {ours[name]}", remedy)
        else:
            result[name] = value
    return result
