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
    """DeepSpeed for cpu or cuda.

    Without MLflow: where that is installed it takes a second, for an autotuner that is not used.
    """
    os.environ["DS_ACCELERATOR"] = device
    hidden = {"mlflow": None} if "mlflow" not in sys.modules else {}
    sys.modules.update(hidden)  # type: ignore[arg-type]
    try:
        import deepspeed  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]
