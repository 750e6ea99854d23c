"""Steps whose gradient is not finite are discarded, whatever optimizer the engine has.

DeepSpeed's own optimizers discard them on all ranks alike, moments and masters untouched, but not
in each combination of stage and precision; where it steps a plain optimizer it never does.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor


def discard_bad_steps(engine: "DeepSpeedEngine", grad_clip: float) -> None:
    """Have the engine leave everything as it is after a step with a gradient that is not finite.

    ``engine.was_step_applied()`` tells which steps counted. The ranks agree: they judge a gradient
    that is reduced over all of them, or a flag that is.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "overflow"):
        judge_plain_steps(engine, grad_clip)
        return
    if hasattr(optimizer, "check_grad_overflow"):  # in fp32 the norm tells, where there is one
        optimizer.check_grad_overflow |= not optimizer.compute_grad_norm
    if hasattr(getattr(optimizer, "loss_scaler", None), "raise_error_at_min_scale"):
        optimizer.loss_scaler.raise_error_at_min_scale = False  # whether to give up is not its part


def judge_plain_steps(engine: "DeepSpeedEngine", grad_clip: float) -> None:
    """Stage 0 without masters: measure, clip and judge the gradient before the optimizer's step."""
    optimizer, step = engine.optimizer, engine.optimizer.step

    def step_if_finite() -> None:
        params = [param for param in engine.module.parameters() if param.grad is not None]
        norm = gradient_norm(params)
        optimizer._global_grad_norm = float(norm)  # where the engine looks for it
        optimizer.overflow = not math.isfinite(optimizer._global_grad_norm)
        if not optimizer.overflow:
            clip(params, norm, grad_clip)
            step()

    engine.clip_fp32_gradients = lambda: None  # it would hide a norm that is infinite
    optimizer.step = step_if_finite


def gradient_norm(params: list["Tensor"]) -> "Tensor":
    """The 2-norm of all gradients together, in fp32, summed as DeepSpeed does."""
    import torch

    norms = [param.grad.float().norm(2.0) for param in params]  # type: ignore[union-attr]
    return torch.stack(norms).pow(2.0).sum().pow(0.5)


def clip(params: list["Tensor"], norm: "Tensor", most: float) -> None:
    """Shrink all gradients alike to a norm of ``most``; 0 leaves them as they are."""
    if most:
        coefficient = (most / (norm + 1e-6)).clamp(max=1.0).reshape(1)  # so that 16 bits wait
        for param in params:
            param.grad.mul_(coefficient)  # type: ignore[union-attr]
