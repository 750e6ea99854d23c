"""A trained model as a Hugging Face folder that opens without any code of ours."""

import errno
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import TrainingError
from llmtrain.folder import publish, write_text

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from llmtrain.data.shards import Manifest

TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "tokenizers",
    "hydra-core",
    "omegaconf",
    "numpy",
)


def readme(name: str, folder: Path, trained: str, opening: str, has_code: bool = False) -> str:
    """What a model's folder says of itself: how it was trained, and the lines that open it.

    ``has_code`` says that the model's class is in the folder, and not in transformers.
    """
    lines = [*opening.format(folder=folder).splitlines(), TOKENIZER.format(folder=folder)]
    code = "\n".join(f"    {line}" for line in lines)
    text = f"# {name}\n\nTrained by llmtrain: {trained}.\n\n{code}\n"
    return with_code(text, folder) if has_code else text


def with_code(text: str, folder: Path) -> str:
    """A text whose lines open model and tokenizer of a folder that has the model's class, too."""
    opening = f'from_pretrained("{folder}"'
    return text.replace(opening, f"{opening}, trust_remote_code=True")


def save_model(
    path: Path, engine: "DeepSpeedEngine", manifest: "Manifest", text: str, is_first: bool
) -> None:
    """Write weights or adapter, configuration and tokenizer to ``path``. Every rank has to call it.

    The weights are those that the forward pass multiplies with, in their own dtype, so the logits
    of the opened folder are the trainer's. ``text`` becomes its README.
    """
    model = engine.module.model
    is_adapter = hasattr(model, "peft_config")
    weights = gather_trainable(model, is_first) if is_adapter else gather_weights(model, is_first)
    if not is_first:
        return
    with partial_folder(path) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        if is_adapter:
            check_adapter(temporary)
        copy_tokenizer(manifest, temporary)
        write_text(temporary / "README.md", text)
        publish(temporary, path)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside a path; nothing of it is left where that fails."""
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except SafetensorError as error:  # it says so in words alone
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_tokenizer(manifest: "Manifest", path: Path) -> None:
    """The tokenizer, and the chat template that dialogues were written with."""
    for file in manifest.vocabulary.folder.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, path / file.name)
    if manifest.chat_template is not None:
        write_text(path / "chat_template.jinja", manifest.chat_template)


def check_adapter(path: Path) -> None:
    """Raise TrainingError for a saved adapter without values (peft #2500)."""
    from safetensors import safe_open

    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    if not shapes or not all(all(shape) for shape in shapes):
        raise TrainingError(f"The adapter in {path} was saved without its values.")


def gather_trainable(model: Any, is_first: bool) -> dict[str, Any]:
    """An adapter's weights on the host of the first rank, by the names of the whole model's."""
    return gather(model, is_first, lambda param: param.requires_grad)


def gather_weights(model: Any, is_first: bool) -> dict[str, Any]:
    """The model's weights on the host of the first rank."""
    weights = gather(model, is_first, lambda param: True)
    if is_first:
        kept = model.state_dict()
        weights |= {name: value.cpu() for name, value in kept.items() if name not in weights}
        tied = getattr(model, "all_tied_weights_keys", {}) or {}
        weights = {name: value for name, value in weights.items() if name not in tied}
    return weights


def gather(model: Any, is_first: bool, is_wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Parameters on the host of the first rank; stage 3 collects them one by one."""
    import deepspeed

    weights = {}
    for name, param in model.named_parameters():
        if not is_wanted(param):
            continue
        partitioned = [param] if hasattr(param, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            if is_first:
                weights[name] = param.detach().to("cpu", copy=True)
    return weights


def environment(device: str) -> dict[str, Any]:
    """What ran: versions, this source tree's commit, and the devices."""
    import torch

    root = Path(__file__).resolve().parent.parent
    count = torch.cuda.device_count() if device == "cuda" else 0
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_commit": git(root, "rev-parse", "HEAD"),
        "git_changes": git(root, "status", "--porcelain"),
        "devices": [torch.cuda.get_device_name(index) for index in range(count)] or ["cpu"],
        "cuda": torch.version.cuda,
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(root: Path, *words: str) -> str | None:
    """What git says of the source tree; None outside a checkout."""
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() if answer.returncode == 0 else None
