"""What every optimizer declares and builds."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmtrain.errors import ConfigError
from llmtrain.schema import Part, learned, unlearned

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from llmtrain.trace import Weights


USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")  # where torch looks last


@dataclass
class Optimizer(Part):
    """Settings of an update rule, and where it works.

    ``stages`` are the ZeRO stages under which its mathematics stays what its name says;
    ``offloads`` says whether its state may live in host memory; ``state_bytes`` is what it keeps
    for each parameter beside the fp32 master copy (``state_follows_weights``: half of that beside
    bf16 weights without one); ``whole_gradients`` that every rank has to see the whole gradient of
    a matrix; ``moves`` that its state can be cut anew for other ranks and stages;
    ``names_compiler`` that its code is marked for torch's compiler, which is then imported;
    ``compiles_for_gpu`` that DeepSpeed builds it with nvcc where its state is on a GPU.
    ``train.grad_clip`` points at ``grad_clip``.
    """

    lr: float = learned("???", above=0)
    weight_decay: float = learned(0.0, low=0)
    grad_clip: float = unlearned(0.0, low=0)

    stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    offloads: ClassVar[bool] = False
    state_bytes: ClassVar[float] = 8.0
    state_follows_weights: ClassVar[bool] = True
    whole_gradients: ClassVar[bool] = False
    moves: ClassVar[bool] = True
    names_compiler: ClassVar[bool] = False
    compiles_for_gpu: ClassVar[bool] = False

    def check(self, device: str, grad_clip: float) -> None:
        """Raise ConfigError where this optimizer cannot work on ``device`` (cpu or cuda)."""

    def check_here(self) -> None:
        """Raise ConfigError for what this machine lacks to run it."""

    def bytes_of_state(self, weights: "Weights", on_host: bool) -> float:
        """What it keeps for all trained parameters in fp32, beside their master copies."""
        return self.state_bytes * weights.num_trainable

    def build(self, model: "nn.Module", device: str, offloaded: bool) -> "TorchOptimizer":
        """The optimizer over the model's trainable parameters."""
        raise NotImplementedError

    def groups(self, model: "nn.Module") -> list[dict[str, Any]]:
        """Two parameter groups: matrices, which decay, and the rest, which do not."""
        trainable = [pair for pair in model.named_parameters() if pair[1].requires_grad]
        decaying = [param for name, param in trainable if decays(name, param)]
        resting = [param for name, param in trainable if not decays(name, param)]
        groups = [
            {"params": decaying, "weight_decay": self.weight_decay},
            {"params": resting, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def decays(name: str, param: Any) -> bool:
    """Gains, biases and a state-space layer's A do not decay: a decayed A forgets faster."""
    return param.ndim >= 2 and not name.endswith("A_log")


def require_package(key: str, value: str, package: str, pip_line: str) -> None:
    """Raise ConfigError naming the pip line where a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            key, value, f"needs {package}, which is not installed", f"run: {pip_line}"
        )


def require_toolkit(key: str, value: str, remedy: str) -> None:
    """Raise ConfigError where nvcc is not found for what DeepSpeed compiles for a GPU."""
    is_told = any(os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    if not is_told and shutil.which("nvcc") is None and not USUAL_NVCC.exists():
        reason = "is compiled for the GPU, and no CUDA toolkit (nvcc) is found"
        remedy = f"install that of torch's CUDA and export CUDA_HOME, or {remedy}"
        raise ConfigError(key, value, reason, remedy)


def require_compiler(key: str, value: str, remedy: str) -> None:
    """Raise ConfigError where no C++ compiler is found for code that is compiled at the start."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        reason = "compiles C++ and no compiler is found"
        raise ConfigError(key, value, reason, f"install g++ or {remedy}")
