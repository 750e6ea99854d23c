"""Architectures that transformers lacks: a file each, with a configuration and a causal model.

The file's name is the configuration's ``model_type``. What is saved takes the file along, so that
transformers opens it elsewhere, with ``trust_remote_code=True``.
"""

import ast
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Of all architectures of ours; a file whose name begins with _ helps others."""
    found = pkgutil.iter_modules([str(FOLDER)])
    return [module.name for module in found if not module.name.startswith("_")]


def file_of(architecture: str | None) -> Path | None:
    """The file of an architecture of ours; None for all others."""
    return FOLDER / f"{architecture}.py" if architecture in names() else None


def check(architecture: str) -> None:
    """Raise ConfigError, without running it, for a file that is no Python or has a taken name."""
    file = file_of(architecture)
    assert file is not None
    try:
        ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise refusal(architecture, f"is no Python in line {error.lineno}: {error.msg}") from None
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    if (Path(spec.origin).parent / "models" / architecture).exists():
        raise refusal(architecture, "has the name of one of transformers", "give it another")


def register(architecture: str | None) -> None:
    """Make transformers know an architecture of ours; nothing is done for all others.

    Raises ConfigError for a file that cannot be imported or has no two such classes.
    """
    if architecture is None or file_of(architecture) is None:
        return
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

    check(architecture)
    try:
        module = importlib.import_module(f"{__name__}.{architecture}")
    except Exception as error:  # whatever a file of the user's may raise
        raise refusal(architecture, f"cannot be imported ({error!r})") from None
    config, model = (defined(module, kind) for kind in (PreTrainedConfig, PreTrainedModel))
    if config is None or model is None or config.model_type != architecture:
        reason = f'lacks a PreTrainedConfig with model_type = "{architecture}", or its model'
        raise refusal(architecture, reason)
    AutoConfig.register(architecture, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")


def defined(module: Any, base: type) -> Any:
    """The last class of a kind that a module defines: parts of a model stand before it."""
    found = [value for value in vars(module).values() if isinstance(value, type)]
    own = [kind for kind in found if issubclass(kind, base) and kind.__module__ == module.__name__]
    return own[-1] if own else None


def refusal(architecture: str, reason: str, remedy: str = "correct it") -> ConfigError:
    reason = f"({file_of(architecture)}) {reason}"
    return ConfigError("model.architecture", architecture, reason, remedy)
