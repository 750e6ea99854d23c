"""bf16 products of a CPU that multiplies fp32 faster: in fp32, and rounded once.

Some CPUs have no bf16 instructions, and some have them at less than fp32's rate. A matrix is cast
in a small part of the time that it is multiplied in, and what comes out is what bf16's own products
give: their terms are exact and their sums in fp32, too. It holds for all code of a process, that of
transformers and torch as well.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

LEAST = 64  # rows, columns and terms from which a product takes longer than its casts
aten = torch.ops.aten
FORMS = {  # of one matrix with another
    each.name().removeprefix("aten::"): each
    for each in (
        *(aten.mm.default, aten.addmm.default, aten.addmm_.default),
        *(aten.mm.out, aten.addmm.out),
    )
}

_library: list[Any] = []  # what is registered lives as long as this does
supposed: list[bool] = []  # of another process whose operations are looked at, innermost last


def install() -> None:
    """Take fp32 for each large product of two bf16 matrices on this process's CPU.

    Batches of small ones, such as attention's, stay as they are: they gain nothing.
    """
    if _library:
        return
    _library.append(torch.library.Library("aten", "IMPL"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel of torch's is replaced
        for form, func in FORMS.items():
            own = torch.library.get_kernel(f"aten::{form}", "CPU")
            product = partial(replaced, func, own.call_boxed)
            _library[0].impl(form, product, "CPU", with_keyset=True, allow_override=True)


def uninstall() -> None:
    """Leave products to torch again."""
    _library.clear()


def are_wide() -> bool:
    """Whether this process makes them in fp32, or looks at what one would do that does."""
    return supposed[-1] if supposed else bool(_library)


def replaced(func: Any, own: Callable[..., Tensor], keys: Any, *args: Any, **named: Any) -> Tensor:
    """A product in fp32 where that is faster; ``keys`` are the dispatcher's."""
    return in_fp32(func, args, named) if is_wide(func, args, named) else own(keys, *args, **named)


def is_wide(func: Any, args: Any, named: dict[str, Any]) -> bool:
    """Whether a call of an aten operation is a product that fp32 is taken for."""
    if func not in FORMS.values():
        return False
    left, right = args[-2:]
    shape, out = (left.shape[0], right.shape[1]), named.get("out")
    is_bf16 = all(factor.dtype is torch.bfloat16 for factor in args)
    is_to_resize = out is not None and out.shape != shape
    return is_bf16 and min(*shape, left.shape[1]) >= LEAST and not is_to_resize


def in_fp32(func: Any, args: Any, named: dict[str, Any]) -> Tensor:
    """What such a call gives."""
    options = {name: value for name, value in named.items() if name != "out"}
    product = (torch.mm, torch.addmm)[len(args) - 2](*(each.float() for each in args), **options)
    written = args[0] if func is aten.addmm_.default else named.get("out")
    return product.bfloat16() if written is None else written.copy_(product)
