"""The keywords of transformers' configuration classes: which exist, and what follows from them."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from llmtrain import architecture as own
from llmtrain.errors import ConfigError, nearest

SIZES = re.compile(r"num_.*|.*_size|.*head_dim|.*expand|.*_kernel|mamba_[dn]_.*|n_.*")


def complete_config(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with what follows from its width, so that overriding the width stays whole.

    Heads follow from ``hidden_size / head_dim``, a feed-forward from 8/3 of the width (Shazeer
    2020) rounded up to a multiple of 256 (64 below a width of 512), a state-space layer's heads
    from its expanded width. Raises ConfigError where a width is no multiple.
    """
    values = dict(config)
    known = keywords(architecture)
    width = values.get("hidden_size")
    if width is None:
        return values
    if (
        "head_dim" in values
        and "num_attention_heads" in known
        and "num_attention_heads" not in values
    ):
        values["num_attention_heads"] = quotient(
            "hidden_size", width, "head_dim", values["head_dim"]
        )
    heads = values.get("num_attention_heads")
    if heads and "head_dim" not in values:
        quotient("hidden_size", width, "num_attention_heads", heads)
    if heads and "num_key_value_heads" in known:
        values.setdefault("num_key_value_heads", heads)
        quotient("num_attention_heads", heads, "num_key_value_heads", values["num_key_value_heads"])
    if heads and "intermediate_size" in known:
        unit = 256 if width >= 512 else 64
        values.setdefault("intermediate_size", -(-8 * width // (3 * unit)) * unit)
    return complete_state_space(values, known)


def complete_state_space(values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The heads of Mamba-2 layers, and a check that the layers named for attention exist."""
    for heads, head_dim, expand in (
        ("num_heads", "head_dim", "expand"),
        ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ):
        if heads in known and head_dim in values and expand in values and heads not in values:
            inner = values[expand] * values["hidden_size"]
            values[heads] = quotient("hidden_size", inner, head_dim, values[head_dim])
    beyond = [i for i in values.get("attn_layer_indices") or [] if i >= values["num_hidden_layers"]]
    if beyond:
        reason = f"names layer {beyond[0]} of {values['num_hidden_layers']}"
        remedy = "give indices below num_hidden_layers"
        raise ConfigError(
            "model.config.attn_layer_indices", values["attn_layer_indices"], reason, remedy
        )
    return values


def quotient(name: str, value: int, divisor_name: str, divisor: int) -> int:
    """``value / divisor`` as a whole number. Raises ConfigError with the nearest values."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"model.config.{name}", value, "is no positive whole number", "give one")
    if value % divisor:
        below, above = value // divisor * divisor, -(-value // divisor) * divisor
        remedy = f"take {above}" if below == 0 else f"take {below} or {above}"
        reason = f"is no multiple of {divisor_name}={divisor}"
        raise ConfigError(f"model.config.{name}", value, reason, remedy)
    return value // divisor


def check_sizes(key: str, config: dict[str, Any]) -> None:
    """Raise ConfigError for a count or a size that is no positive whole number."""
    for name, value in config.items():
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if SIZES.fullmatch(name) and value is not None and not is_count:
            raise ConfigError(
                f"{key}.config.{name}", value, "is no positive whole number", "give one"
            )
    experts = config.get("num_experts") or config.get("num_local_experts")
    used = config.get("num_experts_per_tok")
    if experts and used and used > experts:
        reason = f"is more than the {experts} experts"
        raise ConfigError(
            f"{key}.config.num_experts_per_tok", used, reason, f"give at most {experts}"
        )


def check_keywords(key: str, architecture: str, config: dict[str, Any]) -> None:
    """Raise ConfigError for a keyword that the architecture does not have.

    transformers accepts any keyword in silence, so a misspelt one would train another model.
    """
    known = keywords(architecture)
    for name, value in config.items():
        if name not in known:
            reason = f"is no keyword of {architecture}"
            raise ConfigError(f"{key}.config.{name}", value, reason, nearest(name, known))


@cache
def keywords(architecture: str) -> set[str]:
    """A configuration class's keywords, read from its source.

    Reading takes a millisecond; importing one class takes seconds, because it pulls in torch.
    Raises ConfigError for an architecture that neither transformers nor ``llmtrain.architecture``
    has.
    """
    shared = transformers_folder() / "configuration_utils.py"
    return class_keywords(config_source(architecture)) | class_keywords(shared)


def config_source(architecture: str) -> Path:
    """The file that holds an architecture's configuration class."""
    if (file := own.file_of(architecture)) is not None:
        own.check(architecture)
        return file
    models = transformers_folder() / "models"
    folder = architecture.replace("-", "_")
    path = models / folder / f"configuration_{folder}.py"
    if not path.exists():
        known = [
            path.name
            for path in models.iterdir()
            if (path / f"configuration_{path.name}.py").exists()
        ]
        reason = "is no architecture of transformers"
        raise ConfigError(
            "model.architecture", architecture, reason, nearest(architecture, known + own.names())
        )
    return path


def class_keywords(path: Path) -> set[str]:
    """The annotated fields of the classes in a source file, class variables left out."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    fields = [item for node in classes for item in node.body if isinstance(item, ast.AnnAssign)]
    fields = [item for item in fields if "ClassVar" not in ast.unparse(item.annotation)]
    return {item.target.id for item in fields if isinstance(item.target, ast.Name)}


def transformers_folder() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
