"""Opening a finished model: of a run, of any Hugging Face folder, by a hub name, with its adapter.

Whatever is opened is data: safetensors and JSON, no pickle and no code that lies beside them.
"""

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf.errors import OmegaConfBaseException

from llmtrain.config import RunConfig, load
from llmtrain.errors import DONE, FAILED, REFUSED, STOPPED, ConfigError
from llmtrain.folder import RunFolder
from llmtrain.hardware import cpu_prefers_bf16
from llmtrain.imports import uncollected

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llmtrain.data.shards import Manifest

    # transformers' own class, or peft's around it
    Model = Any

T = TypeVar("T")

ADAPTER = "adapter_config.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Finished:
    """An opened model, its tokenizer, and the config of its run where it is one's.

    ``which`` of a run's models it is: final, best, or step_<n> of a checkpoint; "" without a run.
    """

    run: str
    which: str
    config: RunConfig | None
    model: "Model"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def folder(self) -> RunFolder | None:
        """The folder of its run."""
        return run_folder(self.run) if self.config is not None else None

    @property
    def num_positions(self) -> int | None:
        """How many tokens it can read and write together; None where nothing bounds them."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def options_of(name: str, summary: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with what every command on a finished model takes: which one, and where it runs."""
    options = argparse.ArgumentParser(
        prog=f"python -m llmtrain.{name}",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("run", help="a run folder, any Hugging Face folder, or a hub name")
    options.add_argument("--base", help="the folder of an adapter's base, where it has moved")
    options.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    return options


def command(carry_out: Callable[[Any], None], arguments: Any) -> int:
    """Carry a command out, say a user's mistake in one line, and return the exit code."""
    try:
        carry_out(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return STOPPED
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "out of memory" not in str(error):
            raise
        print("Out of memory: lower --batch-size, or say --device cpu.", file=sys.stderr)
        return FAILED
    return DONE


def open_finished(
    run: str,
    which: str = "auto",
    device: str = "auto",
    base: str | None = None,
    dtype: "torch.dtype | None" = None,
    quantized: bool = True,
) -> Finished:
    """Open what a user names: a run folder, a Hugging Face folder or a hub name.

    ``which`` is auto, final, best, or the step of a checkpoint. ``base`` is the folder of an
    adapter's base, where it has moved. An adapter that was trained over a quantised base is opened
    over one, unless ``quantized`` is false. Raises ConfigError for what cannot be opened.
    """
    config = config_of(run)
    if which.isdecimal() and config is not None:
        model, tokenizer = open_checkpoint(run_folder(run), config, int(which), device)
        return Finished(run, f"step_{which}", config, model, tokenizer)
    path = find_model(run, which)
    loading = training_loading(run_folder(run), config) if quantized and config else {}
    model, tokenizer = open_model(path, device, dtype, base, loading)
    return Finished(run, path.name if config is not None else "", config, model, tokenizer)


def run_folder(run: str) -> RunFolder:
    return RunFolder(Path(run).expanduser())


def config_of(run: str) -> RunConfig | None:
    """The config of a run folder; None for a model that is no run of ours."""
    folder = run_folder(run)
    if not folder.exists():
        return None
    try:
        return load(folder.config)
    except OmegaConfBaseException as error:
        reason = f"has a config of another version ({str(error).splitlines()[0]})"
        raise ConfigError("run", run, reason, f"name its model: {folder.final}") from None


def find_model(run: str, which: str = "auto") -> Path:
    """The final model of a run, else its best so far; a Hugging Face folder; or a hub name.

    Raises ConfigError for a folder without a model.
    """
    folder = run_folder(run)
    if folder.exists():
        return model_of_run(folder, run, which)
    if which != "auto":
        reason = f"chooses among the models of a run, and {run} is no run folder"
        raise ConfigError("--which", which, reason, "leave it out")
    if holds_model(folder.path):
        return folder.path
    if folder.path.exists() or (folder.path.parent.exists() and "/" in run):
        raise no_model(run, "is no run folder and no model folder")
    if not HUB_NAME.fullmatch(run):
        raise no_model(run, "does not exist")
    return Path(run)


def model_of_run(folder: RunFolder, run: str, which: str) -> Path:
    choices = {"final": folder.final, "best": folder.best}
    if which != "auto" and which not in choices:
        raise ConfigError("--which", which, "is no model of a run", "say final or best")
    chosen = list(choices.values()) if which == "auto" else [choices[which]]
    for path in chosen:
        if holds_model(path):
            return path
    what = "model" if which == "auto" else f"{which} model"
    raise no_model(run, f"has no {what} yet")


def holds_model(path: Path) -> bool:
    return (path / "config.json").exists() or (path / ADAPTER).exists()


def no_model(run: str, reason: str) -> ConfigError:
    remedy = "give a folder below outputs/ that has final/ or best/, a model's folder or a hub name"
    return ConfigError("run", run, reason, remedy)


def open_model(
    path: Path,
    device: str = "auto",
    dtype: "torch.dtype | None" = None,
    base: str | None = None,
    loading: dict[str, Any] | None = None,
) -> "tuple[Model, PreTrainedTokenizerBase]":
    """Model and tokenizer of a folder or hub name, ready to read and write on the device.

    An adapter is put on its base. ``dtype`` is that of the weights; None: as they are stored.
    ``loading`` are transformers' own options for a base that is quantised.
    """
    with uncollected():
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
        from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel(ERROR)  # which kernels of its own it does without
    where = device_of(device)
    options = {} if dtype is None else {"dtype": dtype}
    if loading:
        options |= loading | {"device_map": {"": where}}
    adapter = attempt("run", str(path), lambda: adapter_config(str(path)))
    if adapter is None:
        if base is not None:
            raise ConfigError("--base", base, f"has no use: {path} is no adapter", "leave it out")
        model = open_weights("run", str(path), options)
    else:
        model = open_adapter(str(path), open_weights("--base", find_base(adapter, base), options))
    if not loading:
        model.to(where)
    return model.eval(), tokenizer_of(path, base)


def device_of(device: str) -> "torch.device":
    """The device that was asked for; ``auto``: a GPU where there is one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", device, "is not to be had here", "take cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # transformers imports DeepSpeed to save, which says at length what it finds unless told
    os.environ.setdefault("DS_ACCELERATOR", device)
    return torch.device(device)


def attempt(key: str, source: str, read: Callable[[], T]) -> T:
    """What ``read`` gives; whatever it raises over a folder or a name, as one line."""
    try:
        return read()
    except ConfigError:
        raise
    except Exception as error:  # a hub out of reach, a broken file, a stranger's class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"cannot be opened ({lines[0].rstrip('.')})"
        remedy = "check the name or the folder"
        remedy += ", or give the base's: --base FOLDER" if key == "--base" else ""
        raise ConfigError(key, source, reason, remedy) from None


def has_file(source: str, name: str) -> bool:
    return stored_file(source, name) is not None


def stored_file(source: str, name: str) -> str | None:
    """A file of a folder or hub name, fetched if need be; None where there is no such file."""
    from transformers.utils.hub import cached_file

    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def adapter_config(source: str) -> dict[str, Any] | None:
    """What an adapter says of itself; None for a model that is whole."""
    file = stored_file(source, ADAPTER)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def find_base(adapter: dict[str, Any], given: str | None) -> str:
    """The folder or hub name of an adapter's base."""
    source = given or adapter.get("base_model_name_or_path") or ""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    if not HUB_NAME.fullmatch(source):
        reason = "is not there" if given else "is the adapter's base and is not there"
        raise ConfigError("--base", source, reason, "say where it is: --base FOLDER")
    return source


def open_weights(key: str, source: str, options: dict[str, Any]) -> "Model":
    """A whole model. Raises ConfigError where weights are missing: they would be random."""
    from transformers import AutoModelForCausalLM

    from llmtrain import architecture
    from llmtrain.kernel import mixers, products

    config = attempt(key, source, lambda: stored_file(source, "config.json"))
    saved = json.loads(Path(config).read_text(encoding="utf-8")) if config else {}
    architecture.register(saved.get("model_type"))
    safe = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    opened: Any = attempt(
        key, source, lambda: AutoModelForCausalLM.from_pretrained(source, **safe, **options)
    )
    model, info = opened
    if info["missing_keys"]:
        reason = f"lacks weights of the model, {sorted(info['missing_keys'])[0]} for one"
        raise ConfigError(key, source, reason, "fetch or save it again")
    mixers.install(model.config.model_type)
    if not cpu_prefers_bf16():
        products.install()
    return model


def open_adapter(source: str, base: "Model") -> "Model":
    """The base with an adapter on it, by peft."""
    try:
        from peft import PeftModel
    except ImportError:
        reason = "is an adapter, and peft is not installed"
        raise ConfigError("run", source, reason, "pip install peft") from None
    if not has_file(source, "adapter_model.safetensors"):
        raise ConfigError("run", source, "has no adapter_model.safetensors", "save it again")
    with warnings.catch_warnings():  # peft asks transformers by a name that it is giving up
        warnings.simplefilter("ignore", FutureWarning)
        return attempt("run", source, lambda: PeftModel.from_pretrained(base, source))


def tokenizer_of(path: Path, base: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or hub name, of its base where an adapter brings none."""
    adapter = adapter_config(str(path))
    if adapter is None or has_file(str(path), "tokenizer_config.json"):
        return open_tokenizer(str(path))
    return open_tokenizer(find_base(adapter, base))


def open_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return attempt(
        "run", source, lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    )


def training_loading(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """How a run's base was loaded while its adapter was trained, where it was quantised."""
    import torch

    from llmtrain.plan import Plan

    if config.adapter.weight_bytes is None:
        return {}
    dtype = getattr(torch, Plan.load(folder.plan).dtype_name)
    loading: dict[str, Any] = config.adapter.loading(dtype, config.model.facts(config.cache))
    return loading | {"dtype": dtype}


def open_checkpoint(
    folder: RunFolder, config: RunConfig, step: int, device: str
) -> "tuple[Model, PreTrainedTokenizerBase]":
    """The model as it was at a checkpoint, put together from the fragments of its masters.

    Parameters that were not trained are the base's own. Raises ConfigError for a step without a
    checkpoint.
    """
    import torch

    from llmtrain.checkpoint import MASTER, Fragments, Piece
    from llmtrain.engine import build_model
    from llmtrain.plan import Plan

    steps = folder.checkpoint_steps()
    if step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise ConfigError("--which", step, f"is no checkpoint ({known} kept)", "say best or final")
    where, manifest = device_of(device), open_manifest(folder)
    eager = replace(config, train=replace(config.train, compile=False))
    plan = replace(Plan.load(folder.plan), attention="eager")  # what any device has
    model: Any = build_model(eager, plan, manifest.vocabulary)
    fragments = Fragments(folder.checkpoint(step), rank=0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad:
                flat = torch.empty(param.numel())
                fragments.fill(MASTER, Piece(name, 0, param.numel(), flat, 0), flat)
                param.copy_(flat.view_as(param))
    tokenizer = open_tokenizer(str(manifest.vocabulary.folder))
    tokenizer.chat_template = manifest.chat_template or tokenizer.chat_template
    return model.to(where).eval(), tokenizer


def open_manifest(folder: RunFolder) -> "Manifest":
    """What a run's data were prepared as. Raises ConfigError where the cache has been cleared."""
    from llmtrain.data.shards import Manifest

    path = Path(json.loads(folder.manifest.read_text(encoding="utf-8"))["folder"])
    if not path.is_dir():
        reason = "held the run's tokens and is gone"
        raise ConfigError("cache_root", path, reason, "run the training command again")
    return Manifest.load(path)
