"""A translation as an experiment file, tried before it is kept."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from llmtrain.compose import composed
from llmtrain.compose.composing import CONF
from llmtrain.errors import ConfigError
from llmtrain.folder import write_text
from llmtrain.migrate.correspondence import Setting
from llmtrain.migrate.translate import Translation
from llmtrain.schema import GROUPS, check_bounds

GROUP = "experiment"  # the folder that Hydra looks for experiments in
ORDER = ("name", "seed", "model", "data", "train", "optimizer", "schedule", "adapter")


def place_of(out: str | None, file: Path) -> Path:
    """The file to write. Raises ConfigError for one that is there, or that no run could name."""
    place = Path(out).expanduser() if out else CONF / GROUP / f"{name_of(file)}.yaml"
    if place.suffix != ".yaml" or place.absolute().parent.name != GROUP:
        reason = f"is no .yaml file in a folder named {GROUP}"
        remedy = f"say --out {place.parent / GROUP / name_of(place)}.yaml"
        raise ConfigError("--out", place, reason, remedy)
    if place.exists():
        raise ConfigError("--out", place, "exists", "give another name, or remove it")
    return place


def name_of(file: Path) -> str:
    """A name that the command line takes without quotes."""
    return re.sub(r"\W+", "_", file.stem).strip("_") or GROUP


def command_of(place: Path, asks: list[str], module: str = "run") -> str:
    """The line that runs the experiment of a file."""
    folder = place.absolute().parent.parent
    words = [] if folder == CONF else ["--config-dir", shlex.quote(str(folder))]
    return " ".join(["python -m llmtrain." + module, *words, f"{GROUP}={place.stem}", *asks])


def text_of(made: Translation, command: str, origin: str) -> str:
    """The experiment file: its command, its choices, and each setting with what it was made of."""
    choices = {key: value for key, value in made.settings.items() if key in GROUPS}
    lines = ["# @package _global_", f"# {command}", f"# {origin}"]
    if choices:
        lines.append("defaults:")
        lines += [
            f"  - override /{group}: {each.value}  # {each.source}"
            for group, each in choices.items()
        ]
    lines.append("")
    return "\n".join([*lines, *sections(made.settings)]) + "\n"


def sections(settings: dict[str, Setting]) -> Iterator[str]:
    """The lines of all settings, a key of the root or a group after the other."""
    names = {key.partition(".")[0] for key in settings if key not in GROUPS}
    rank = {name: number for number, name in enumerate(ORDER)}
    for name in sorted(names, key=lambda name: (rank.get(name, len(ORDER)), name)):
        if name in settings and name not in GROUPS:
            yield line_of(name, settings[name])
            continue
        yield f"{name}:"
        for key, setting in settings.items():
            if key.startswith(f"{name}."):
                yield "  " + line_of(key.partition(".")[2], setting)


def line_of(key: str, setting: Setting) -> str:
    return f"{key}: {written(setting.value)}  # {setting.source}"


def written(value: Any) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def write(place: Path, text: str) -> None:
    """Keep an experiment that Hydra composes. Raises ConfigError for one that is refused."""
    try_out(text, place.stem)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, text)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise ConfigError(
            "--out", place, reason, f"say --out <folder>/{GROUP}/<name>.yaml"
        ) from None


def try_out(text: str, name: str) -> None:
    """Compose an experiment as a run would, from a folder of its own."""
    with TemporaryDirectory() as folder:
        (Path(folder) / GROUP).mkdir()
        (Path(folder) / GROUP / f"{name}.yaml").write_text(text, encoding="utf-8")
        check_bounds(composed([f"hydra.searchpath=[file://{folder}]", f"{GROUP}={name}"]))
