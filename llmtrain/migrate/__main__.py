"""Turn another trainer's settings into an experiment of ours, and say what does not carry over.

It reads a DeepSpeed JSON, TrainingArguments as JSON, and a LLaMA-Factory or axolotl YAML.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.finished import command
from llmtrain.migrate.correspondence import Case, Format, Setting
from llmtrain.migrate.experiment import command_of, place_of, text_of, write
from llmtrain.migrate.format.axolotl import AXOLOTL
from llmtrain.migrate.format.deepspeed import DEEPSPEED
from llmtrain.migrate.format.hf_trainer import HF_TRAINER
from llmtrain.migrate.format.llama_factory import LLAMA_FACTORY
from llmtrain.migrate.show import told
from llmtrain.migrate.translate import translate

FORMATS = (AXOLOTL, LLAMA_FACTORY, HF_TRAINER, DEEPSPEED)  # LLaMA-Factory has the Trainer's marks

EXAMPLES = """examples:
  python -m llmtrain.migrate qwen3_lora_sft.yaml --num-processes 8
  python -m llmtrain.migrate ds_z3_offload.json --out conf/experiment/offload.yaml
"""


def main(words: list[str] | None = None) -> int:
    """Migrate the file of the command line, and return the exit code."""
    return command(migrate, parser().parse_args(words))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(
        prog="python -m llmtrain.migrate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("file", help="the settings, as JSON or YAML")
    options.add_argument("--out", help="default: conf/experiment/<name of the file>.yaml")
    options.add_argument(
        "--num-processes",
        type=int,
        default=1,
        help="that trained together, for the batch of a step",
    )
    return options


def migrate(arguments: argparse.Namespace) -> None:
    """Write the experiment. Raises ConfigError for a file of no known format."""
    file = Path(arguments.file).expanduser()
    values = read(file)
    form = format_of(values, file)
    place = place_of(arguments.out, file)
    if arguments.num_processes < 1:
        raise ConfigError(
            "--num-processes", arguments.num_processes, "is below 1", "give 1 or more"
        )
    made = translate(values, form, Case(file.absolute().parent, arguments.num_processes))
    made.settings.setdefault("name", Setting(place.stem, "of this file"))
    origin = f"From {file.name} of {form.name}, by python -m llmtrain.migrate."
    write(place, text_of(made, command_of(place, made.asks), origin))
    print("\n".join(told(made, place, form.name)))


def read(file: Path) -> dict[str, Any]:
    """The mapping that a file holds. Raises ConfigError where it holds none."""
    from omegaconf import OmegaConf

    try:
        text = file.read_text(encoding="utf-8")
        is_json = text.lstrip().startswith("{")
        # YAML's own rules take 1e-4 for a text; OmegaConf's take it for a number, as trainers do.
        values = json.loads(text) if is_json else OmegaConf.to_container(OmegaConf.create(text))
    except OSError as error:
        reason = str(error.strerror).lower()
        raise ConfigError("file", file, f"cannot be read: {reason}", "correct the path") from None
    except Exception as error:  # JSON's, YAML's and OmegaConf's have no class in common
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("file", file, f"is neither JSON nor YAML: {line}", "correct it") from None
    if not isinstance(values, dict) or not values:
        raise ConfigError("file", file, "holds no settings by name", "give another")
    return {str(name): value for name, value in values.items()}


def format_of(values: dict[str, Any], file: Path) -> Format:
    """The format that a file's keys show."""
    for form in FORMATS:
        if form.marks & set(values):
            return form
    names = ", ".join(form.name for form in FORMATS)
    raise ConfigError("file", file, f"has no key of {names}", "give a file of one of them")


if __name__ == "__main__":
    sys.exit(main())
