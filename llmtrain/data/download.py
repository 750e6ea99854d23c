"""`python -m llmtrain.data download`: a data set or a model's weights onto this disk, whole."""

import argparse
import glob
import hashlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmtrain.data.cache import create
from llmtrain.data.catalogue import (
    CONF,
    Entry,
    RowFormat,
    default_folder,
    find_entry,
    parse_size,
    read_yaml,
)
from llmtrain.data.published import RECORD, Record, is_whole
from llmtrain.data.repository import File, HuggingFace, ModelScope, Repository
from llmtrain.errors import STOPPED, ConfigError, TrainingError

GIB = 2**30
MOST_SHOWN = 12  # files of a model by name
WEIGHTS = re.compile(
    r"(?!consolidated).*\.(safetensors|json|model|txt|jinja|md)|(LICENSE|NOTICE).*"
)
PICKLED = re.compile(r".*\.(bin|pth|pt)")  # taken only where there are no safetensors


def download(arguments: argparse.Namespace) -> None:
    """Fetch what the command line names. A second call continues the first."""
    if (arguments.name is None) is (arguments.model is None):
        remedy = "give a name of the catalogue, or --model NAME: python -m llmtrain.data list"
        raise ConfigError("download", arguments.name, "is not one thing to fetch", remedy)
    if arguments.model is not None:
        download_model(arguments)
    else:
        download_entry(arguments, find_entry(arguments.name, "download"))


def download_entry(arguments: argparse.Namespace, entry: Entry) -> None:
    """Fetch a data set, or a part of it that has about so many tokens."""
    published = entry.published
    folder = folder_of(arguments.to, default_folder(entry.name))
    repository = repository_of(arguments, published.hub, published.modelscope, published.revision)
    files = [file for file in repository.files() if published.holds(file.path)]
    require_any(repository, files, published.files)
    share = share_of(arguments.tokens, published.num_tokens)
    files = part_of(files, share)
    print(f"{published.title}: {show_size(files)} from {repository}. Licence: {published.licence}.")
    names = published.files if share == 1 else [glob.escape(file.path) for file in files]
    bring(repository, files, names, folder)
    mode = "mode=sft " if published.format is RowFormat.sft else ""
    use = f"{mode}data={entry.name}"
    use += f" data.path={folder}" if folder != default_folder(entry.name) else ""
    print(f"It is in {folder}. Use it: python -m llmtrain.run {use}")


def download_model(arguments: argparse.Namespace) -> None:
    """Fetch a model's weights, configuration and tokenizer; their sizes are listed first."""
    hub = hub_of(arguments.model)
    folder = folder_of(arguments.to, default_folder("").parent / "models" / hub.replace("/", "--"))
    repository = repository_of(arguments, hub, hub, "main", is_model=True)
    files = weights_of(repository.files())
    require_any(repository, files, ["*.safetensors"])
    for file in sorted(files, key=lambda file: -file.size)[:MOST_SHOWN]:
        print(f"  {file.size / GIB:9.3f} GiB  {file.path}")
    print(f"{hub}: {show_size(files)} from {repository}.")
    bring(repository, files, [glob.escape(file.path) for file in files], folder)
    name = f"model={arguments.model}" if arguments.model != hub else "model=pretrained"
    print(f"It is in {folder}. Use it: python -m llmtrain.run {name} model.path={folder} ...")


def hub_of(name: str) -> str:
    """The hub name of a model preset that has one, or the name as it stands."""
    path = CONF / "model" / f"{name}.yaml"
    hub = read_yaml(path).get("hub") if path.is_file() else None
    if hub is None and "/" not in name:
        remedy = "give a preset with a public name, such as qwen2_5_7b, or org/name"
        raise ConfigError("--model", name, "has no weights on the hub", remedy)
    return str(hub or name)


def weights_of(files: Sequence[File]) -> list[File]:
    """What transformers needs of a model, as safetensors where they exist."""
    top = [file for file in files if "/" not in file.path]
    wanted = [file for file in top if WEIGHTS.fullmatch(file.path)]
    if any(file.path.endswith(".safetensors") for file in wanted):
        return wanted
    return wanted + [file for file in top if PICKLED.fullmatch(file.path)]


def repository_of(
    arguments: argparse.Namespace,
    hub: str,
    modelscope: str | None,
    revision: str,
    is_model: bool = False,
) -> Repository:
    """Where to fetch from: what ``--from`` and ``--id`` say."""
    if arguments.source == "huggingface":
        return HuggingFace(arguments.id or hub, revision, is_model)
    if arguments.id is None and modelscope is None:
        remedy = "find a copy on modelscope.cn and give --id org/name, or leave --from out"
        raise ConfigError("--from", "modelscope", f"has no copy of {hub} that is known", remedy)
    return ModelScope(arguments.id or str(modelscope), is_model)


def require_any(repository: Repository, files: Sequence[File], patterns: Sequence[str]) -> None:
    if not files:
        reason = f"has no file {' or '.join(patterns)}"
        remedy = "its owner may have moved them: look there, and report it"
        raise ConfigError("download", repository.name, reason, remedy)


def folder_of(asked: str | None, default: Path) -> Path:
    return Path(asked).expanduser().absolute() if asked else default


def share_of(asked: str | None, num_tokens: float) -> float:
    """The part of a data set that has about as many tokens as were asked for."""
    if asked is None:
        return 1.0
    tokens = parse_size(asked)
    if tokens is None:
        raise ConfigError("--tokens", asked, "is no number", "give one such as 500m or 20b")
    return min(1.0, tokens / num_tokens)


def part_of(files: Sequence[File], share: float) -> list[File]:
    """Files with about this share of the bytes, spread over all; a larger part has the smaller."""
    target = share * sum(file.size for file in files)
    taken, num_bytes = [], 0
    for file in sorted(files, key=lambda file: hashlib.sha256(file.path.encode()).digest()):
        if num_bytes >= target:
            break
        taken.append(file)
        num_bytes += file.size
    return sorted(taken)


def show_size(files: Sequence[File]) -> str:
    num_bytes = sum(file.size for file in files)
    count = "1 file" if len(files) == 1 else f"{len(files):,} files"
    return f"{count}, {num_bytes / GIB:,.3g} GiB"


def bring(
    repository: Repository, files: Sequence[File], patterns: Sequence[str], folder: Path
) -> None:
    """Have these files in the folder, whole; nothing is fetched twice. ``patterns`` name them."""
    create(folder)
    record = Record(repository.name, repository.revision, {file.path: file.size for file in files})
    with alone_in(folder):
        repository.clear(folder)
        missing = [file for file in files if not is_whole(folder / file.path, file.size)]
        check_room(folder, sum(file.size for file in missing))
        record.save(folder)
        if missing:
            with stoppable():
                repository.fetch(patterns, folder)
    if left := record.missing(folder):
        reason = f"{len(left)} of {len(files)} files did not come, the first: {left[0]}"
        raise TrainingError(f"{repository}: {reason}. The same command continues.")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other download fills this folder, and keep others waiting."""
    from filelock import FileLock

    with FileLock(folder / f"{RECORD}.lock"):
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl+C end this process now: threads that fetch would first end their files."""
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stop(*_: object) -> None:
    sys.stdout.flush()
    print("Stopped. The same command continues.", file=sys.stderr, flush=True)
    os._exit(STOPPED)


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse what the disk has no room for."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        reason = f"has {free / GIB:.3g} GiB free, and {num_bytes / GIB:.3g} GiB are still to come"
        remedy = "free some, give --to on a larger disk, or take a part with --tokens"
        raise ConfigError("--to", folder, reason, remedy)
