"""Models that exist: folders and hub names, and what tells their weights from others."""

import hashlib
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError

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
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or is_beside
    if looks_local and not folder.exists():
        raise ConfigError(
            key, path, "does not exist", "give a folder or a hub name such as org/model"
        )


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
