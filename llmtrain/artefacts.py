"""A trained model as a Hugging Face folder that opens without any code of ours."""

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.folder import publish, write_text

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from llmtrain.data.tokenizer import Vocabulary

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "hydra-core", "omegaconf", "numpy")

README = """# {name}

Trained by llmtrain: {steps} steps, {tokens} tokens{loss}.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{folder}")
    tokenizer = AutoTokenizer.from_pretrained("{folder}")
"""


def save_model(
    path: Path, engine: "DeepSpeedEngine", vocabulary: "Vocabulary", readme: str, is_first: bool
) -> None:
    """Write weights, configuration and tokenizer to ``path``. Every rank has to call it.

    The weights are those that the forward pass multiplies with, in their own dtype, so the logits
    of the opened folder are the trainer's.
    """
    weights = gather_weights(engine, is_first)
    if not is_first:
        return
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    engine.module.model.save_pretrained(temporary, state_dict=weights)
    for file in vocabulary.folder.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, temporary / file.name)
    write_text(temporary / "README.md", readme)
    publish(temporary, path)


def gather_weights(engine: "DeepSpeedEngine", is_first: bool) -> dict[str, Any]:
    """The model's weights on the host of the first rank; stage 3 collects them one by one."""
    import deepspeed

    weights = {}
    for name, param in engine.module.model.named_parameters():
        partitioned = [param] if hasattr(param, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            if is_first:
                weights[name] = param.detach().to("cpu", copy=True)
    if is_first:
        kept = engine.module.model.state_dict()
        weights |= {name: value.cpu() for name, value in kept.items() if name not in weights}
        tied = getattr(engine.module.model, "all_tied_weights_keys", {}) or {}
        weights = {name: value for name, value in weights.items() if name not in tied}
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
