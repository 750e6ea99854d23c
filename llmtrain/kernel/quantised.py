"""What a 4-bit linear layer takes, for a plan: the bytes that bitsandbytes' layer has and makes."""

# I inputs, O outputs

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale
SCALES_BLOCK = 256  # 8-bit scales that share one in fp32


class Quantised(nn.Linear):
    """In the place of a linear layer: weights in 4 bits, multiplied in their storage's dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.shape_OI = tuple(layer.weight.shape)
        size, dtype = layer.weight.numel(), layer.weight.dtype
        packed = layer.weight.new_empty(-(-size // (2 * dtype.itemsize)), 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        num_blocks = -(-size // BLOCK)
        scales = torch.empty(num_blocks, dtype=torch.uint8)
        self.register_buffer("scales", scales)
        self.register_buffer("scales_of_scales", torch.empty(-(-num_blocks // SCALES_BLOCK)))

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self.weight, self.shape_OI)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """The whole weight is there while it is multiplied with, forward and backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, shape_OI: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape_OI = shape_OI
        return nn.functional.linear(input, packed.new_empty(shape_OI))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        return grad @ packed.new_empty(ctx.shape_OI), None, None


def quantise(model: nn.Module, left_out: list[str]) -> None:
    """Put such layers in the place of all linear ones but those that are named."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in left_out:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Quantised(module))
