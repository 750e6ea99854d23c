"""What swapping to a disk needs of a machine."""

import os
import shutil
import subprocess

from llmtrain.errors import ConfigError
from llmtrain.optimizer.base import require_compiler

PROGRAM = b"#include <libaio.h>\nint main() { return io_setup(1, nullptr); }\n"


def require_libaio(key: str) -> None:
    """Raise ConfigError where DeepSpeed's reader and writer of swapped tensors cannot be built."""
    require_compiler(key, "nvme", "take cpu")
    if not links_libaio():
        reason = "needs libaio and its header, which are not found"
        raise ConfigError(key, "nvme", reason, "run: apt-get install libaio-dev, or take cpu")


def check_weights_on_disk(device: str, world_size: int, precision: str) -> None:
    """Raise ConfigError where DeepSpeed 0.19 cannot read weights from a disk: on CPUs, partly."""
    if device != "cpu":
        return
    if precision != "bf16":
        reason = f"reads weights as bf16 on a CPU, and train.precision is {precision}"
        raise ConfigError("zero.offload_params", "nvme", reason, "take bf16, or cpu")
    if world_size == 1:  # what backward still needs lies in the buffers that are read into
        reason = "would read weights over those in use where one CPU process has them all"
        raise ConfigError("zero.offload_params", "nvme", reason, "take hardware=cpux2, or cpu")


def links_libaio() -> bool:
    """Whether a program against libaio compiles and links here."""
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")))
    command = [compiler, "-x", "c++", "-", "-laio", "-o", os.devnull]
    ended = subprocess.run(command, input=PROGRAM, capture_output=True, check=False)
    return ended.returncode == 0
