"""Loops over chunks, which a plan walks in a few steps: its tensors have shapes and no values."""

from collections.abc import Iterator

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

num_alike = 1  # how many steps the one stands for that runs now
planned_device: str | None = None  # what fake tensors stand for, on a machine that may lack it


def walk(num_chunks: int, like: Tensor) -> Iterator[int]:
    """The numbers of the chunks; where ``like`` is fake, the second stands for all that follow.

    Each chunk makes the same tensors as the one before and drops them, so that the bytes at the
    peak do not depend on how many there are.
    """
    global num_alike
    if num_chunks <= 2 or not isinstance(like, FakeTensor):
        yield from range(num_chunks)
        return
    yield 0
    around = num_alike
    num_alike = around * (num_chunks - 1)
    yield 1
    num_alike = around


def device_type(tensor: Tensor) -> str:
    """The kind of device that a tensor lies on, or would lie on where a plan is made for it."""
    is_fake = isinstance(tensor, FakeTensor)
    return planned_device if is_fake and planned_device else tensor.device.type
