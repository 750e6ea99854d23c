"""A plan as DeepSpeed's dictionary: a pure function."""

from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.plan import Plan

OURS_ALONE = {"bf16", "fp16", "optimizer", "scheduler", "train_batch_size"}


def deepspeed_config(plan: Plan, extra: dict[str, Any]) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``, with a user's further keys merged into it.

    Raises ConfigError for a further key that a plan already decides.
    """
    ours = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum,
        "gradient_clipping": plan.grad_clip,
        "steps_per_print": 2**31,  # the run folder holds the metrics
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_optimization(plan),
        **precision(plan),
    }
    for name in OURS_ALONE & set(extra):
        reason = "is decided by train.precision, optimizer and schedule"
        raise ConfigError(f"zero.extra.{name}", extra[name], reason, "leave it out")
    return merged(ours, extra, "zero.extra")


def zero_optimization(plan: Plan) -> dict[str, Any]:
    """The block that spreads states over ranks and memories."""
    block: dict[str, Any] = {"stage": plan.zero_stage, "reduce_scatter": plan.reduce_scatter}
    if plan.offload_optimizer != "none":
        block["offload_optimizer"] = offload(plan.offload_optimizer, plan.nvme_path)
    if plan.offload_params != "none":
        block["offload_param"] = offload(plan.offload_params, plan.nvme_path)
    return block


def offload(device: str, nvme_path: str | None) -> dict[str, Any]:
    """Where one kind of state goes."""
    if device == "nvme":
        return {"device": "nvme", "nvme_path": nvme_path}
    return {"device": "cpu", "pin_memory": True}


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
    """Two nested dictionaries as one. Raises ConfigError where both hold a value for one key."""
    result = dict(ours)
    for name, value in extra.items():
        key = f"{prefix}.{name}"
        if isinstance(value, dict) and isinstance(ours.get(name), dict):
            result[name] = merged(ours[name], value, key)
        elif name in ours:
            remedy = "leave it out: train.*, zero.* and checkpoint.* decide it"
            raise ConfigError(key, value, f"stands against the plan's {ours[name]}", remedy)
        else:
            result[name] = value
    return result
