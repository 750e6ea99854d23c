"""The norm of gradients under Muon, where ZeRO has its update in their place by the time it looks.

DeepSpeed's stages 1 to 3 make a Muon group's gradients orthogonal before they take the norm that
the engine reports and judges. Here the norms are taken before, and handed over instead.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

Norms = dict[int, list["Tensor"]]  # id of a list of parameters -> norms of what a rank counts of it


def look_before_muon(engine: "DeepSpeedEngine") -> None:
    """Let the engine's norm be that of all gradients. Muon's state is never offloaded."""
    optimizer = engine.optimizer
    norms: Norms = {}
    direct = optimizer.get_grad_norm_direct

    def norm_of(gradients: Any, params: list[Any], norm_type: int = 2) -> "Tensor":
        return direct(norms.pop(id(params), gradients), params, norm_type)

    optimizer.get_grad_norm_direct = norm_of
    watch = watch_stage_3 if engine.zero_optimization_stage() == 3 else watch_stages_1_and_2
    watch(optimizer, norms)


def watch_stages_1_and_2(optimizer: Any, norms: Norms) -> None:
    """Whole gradients become a rank's partition and Muon's update in one function.

    A matrix may lie in the partitions of several ranks; that in which it begins counts it.
    """
    from torch.distributed import get_rank

    flatten = optimizer.get_flat_partition

    def watched(params: list[Any], *rest: Any, param_group_idx: int, **named: Any) -> Any:
        if params and optimizer._is_muon_group(params):
            rank = get_rank(optimizer.real_dp_process_group[param_group_idx])
            first = optimizer.grad_start_offset[param_group_idx][rank]
            gradients = optimizer.all_grad_tensors[param_group_idx]
            norms[id(params)] = [
                scaled_norm(gradient, optimizer) * (first[optimizer.get_param_id(param)] == 0)
                for param, gradient in zip(params, gradients, strict=True)
            ]
        return flatten(params, *rest, param_group_idx=param_group_idx, **named)

    optimizer.get_flat_partition = watched


def watch_stage_3(optimizer: Any, norms: Norms) -> None:
    """A rank's parts of all gradients are there until Muon's update replaces them.

    That also moves its momentum, so it is left out where any gradient is not finite; DeepSpeed
    discards such a step by its norm only afterwards.
    """
    apply = optimizer._apply_muon_to_accumulated_grads

    def watched() -> None:
        for number, params in enumerate(optimizer.fp16_groups):
            if optimizer.sub_groups_using_muon[number] and params:
                parts = optimizer.averaged_gradients[number]
                norms[id(params)] = [scaled_norm(part, optimizer) for part in parts]
        if not optimizer.has_overflow():
            apply()

    optimizer._apply_muon_to_accumulated_grads = watched


def scaled_norm(gradient: "Tensor", optimizer: Any) -> "Tensor":
    """In fp32; without loss scale, which DeepSpeed gives to the norm of an update."""
    return gradient.float().norm() / optimizer.loss_scale
