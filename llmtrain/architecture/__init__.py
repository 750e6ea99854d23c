"""Architectures that transformers lacks: a file each, with a configuration and a causal model.

The file's name is the configuration's ``model_type``. What is saved takes the file along, so that
transformers opens it elsewhere, with ``trust_remote_code=True``.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def file_of(architecture: str) -> Path | None:
    """The file of an architecture of ours; None for all others."""
    path = FOLDER / f"{architecture}.py"
    return path if architecture in names() else None


def names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules([str(FOLDER)])]


def register() -> None:
    """Make transformers know these architectures by their ``model_type``."""
    for name in names():
        enter(importlib.import_module(f"{__name__}.{name}"))


def enter(module: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

    config, model = defined(module, PreTrainedConfig), defined(module, PreTrainedModel)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")


def defined(module: Any, base: type) -> Any:
    """The last class of a kind that a module defines: parts of a model stand before it."""
    found = [value for value in vars(module).values() if isinstance(value, type)]
    own = [kind for kind in found if issubclass(kind, base) and kind.__module__ == module.__name__]
    return own[-1]
