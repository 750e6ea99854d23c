"""Bytes of the tensors that live, seen op by op: measured on real tensors, planned on fake ones."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.kernel import products


class LiveTensors(TorchDispatchMode):
    """Counts each storage once, from the op that makes it until nothing refers to it any more.

    ``live_bytes`` is the sum now and ``peak_bytes`` the highest after any op. What an operator
    needs inside itself is not seen, but for products that ``kernel.products`` makes in fp32.
    """

    def __init__(self, has_wide_products: bool = False) -> None:
        super().__init__()
        self.has_wide_products = has_wide_products
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, Any] = {}
        self._ignored: set[int] = set()

    def __enter__(self) -> Any:
        products.supposed.append(self.has_wide_products)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        products.supposed.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.has_wide_products and products.is_wide(func, args, kwargs):
            with self:  # casts and product are seen in its place
                return products.in_fp32(func, args, kwargs)
        out = self.run(func, args, kwargs)
        for tensor in tensors_of(out):
            self.add(tensor)
        self.note(func, args, kwargs, out)
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an op gives."""
        return func(*args, **kwargs)

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """What is done after each op."""
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored:
            return
        size = storage.nbytes()
        known = self._storages.get(key)
        if known is not None:
            if known[1] != size:  # resized in place
                self.live_bytes += size - known[1]
                self._storages[key] = (known[0], size)
            return
        self._storages[key] = (weakref.ref(storage, lambda _: self.forget(key)), size)
        self.live_bytes += size

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave out tensors that outlive this account."""
        self._ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def forget(self, key: int) -> None:
        """A storage has died."""
        _, size = self._storages.pop(key)
        self.live_bytes -= size


def tensors_of(out: Any) -> list[torch.Tensor]:
    """The tensors that an op gives."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, tuple | list):
        return [item for item in out if isinstance(item, torch.Tensor)]
    return []
