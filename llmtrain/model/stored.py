"""Models that exist: folders and hub names, and what tells their weights from others."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.model.keywords import SIZES

ENDS_BYTES = 2**22  # read of a weight file to tell it from another: its header and its last values


def check_path(key: str, path: str) -> None:
    """Raise ConfigError for a folder without a model; a hub name is left to the hub."""
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        remedy = f"merge it first: python -m llmtrain.export {path} --to merged"
        raise ConfigError(key, path, "is an adapter without its model", remedy)
    if folder.exists() and not (folder / "config.json").exists():
        raise ConfigError(
            key, path, "holds no config.json", "give a folder such as outputs/<run>/final"
        )
    is_beside = "/" in path and folder.parent.is_dir()  # outputs/<a run that is not there>
    if not path.strip():
        raise ConfigError(key, path, "is empty", "give a folder or a hub name such as org/model")
    if folder.exists():
        check_stored(key, path, read_config(key, folder / "config.json"))
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or is_beside
    if looks_local and not folder.exists():
        raise ConfigError(
            key, path, "does not exist", "give a folder or a hub name such as org/model"
        )


def read_config(key: str, file: Path) -> dict[str, Any]:
    """A model folder's configuration. Raises ConfigError where it cannot be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error}"
        raise ConfigError(key, file, reason, "save the model again") from None
    if not isinstance(values, dict):
        raise ConfigError(key, file, "holds no model's configuration", "save the model again")
    return values


def check_stored(key: str, path: str, values: dict[str, Any]) -> None:
    """Raise ConfigError for sizes that no model has, and for weights that cannot be trained."""
    for name, value in values.items():
        if SIZES.fullmatch(name) and isinstance(value, int) and value < 1:
            reason = f"has {name}={value} in its config.json"
            raise ConfigError(key, path, reason, "save the model again")
    method = (values.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        remedy = "take the model that was not quantised; adapter=qlora makes 4 bits of it"
        raise ConfigError(key, path, f"holds weights quantised by {method}", remedy)


def make_savable(settings: Any) -> None:
    """Let a generation config sample where it only says how: transformers saves no other."""
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True


def digest_of_weights(folder: Path) -> str:
    """A hash over a model folder's configuration and the size and both ends of its weights."""
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        sha.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as reader:
            sha.update(reader.read(ENDS_BYTES))
            reader.seek(max(0, file.stat().st_size - ENDS_BYTES))
            sha.update(reader.read())
    return sha.hexdigest()[:16]
