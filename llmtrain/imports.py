"""Imports of large libraries, which are most of what a start takes."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile, and never again among what is there at the end.

    Imports make millions of objects and hardly any garbage, and each search goes through all.
    """
    gc.collect()  # what is garbage by now would stay
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_deepspeed(device: str) -> None:
    """DeepSpeed for cpu or cuda, without what it would import and is better without.

    MLflow takes a second, for an autotuner that is not used. With pynvml DeepSpeed would read
    CUDA_VISIBLE_DEVICES as numbers, and fail where a seat or a queue has put UUIDs.
    """
    os.environ["DS_ACCELERATOR"] = device
    import torch  # noqa: F401  # which would look for pynvml once, too

    with hidden("mlflow", "pynvml"):
        import deepspeed  # noqa: F401


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Let imports meanwhile find that some packages are not installed."""
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
