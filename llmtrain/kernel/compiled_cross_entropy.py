"""The loss and the gradient of rows of logits on a CPU, in place, by ``cross_entropy.c``."""

# C rows, V vocabulary

import ctypes
from ctypes import byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from llmtrain.kernel.compiled import KINDS, call, wide


class _Rows(ctypes.Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("rows", "columns", "kind", "threads")],
        *[(name, c_void_p) for name in ("logits", "labels", "losses")],
    ]


@torch.library.custom_op("llmtrain::compiled_cross_entropy", mutates_args=("logits_CV",))
def loss_and_gradient(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """The loss of each row [C]; the logits become their gradient. Both are contiguous."""
    losses_C = logits_CV.new_empty(len(logits_CV), dtype=wide(logits_CV.dtype))
    sizes = (*logits_CV.shape, KINDS[logits_CV.dtype], torch.get_num_threads())
    pointers = (tensor.data_ptr() for tensor in (logits_CV, labels_C, losses_C))
    call("cross_entropy", "cross_entropy", losses_C.dtype, byref(_Rows(*sizes, *pointers)))
    return losses_C


@loss_and_gradient.register_fake
def _(logits_CV: Tensor, labels_C: Tensor) -> Any:
    return logits_CV.new_empty(len(logits_CV), dtype=wide(logits_CV.dtype))
