"""Data for training: what others published, how much a model needs, and a look at own rows."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtrain.data.corpus import Document
from llmtrain.data.download import download
from llmtrain.data.example import Example, LossOn
from llmtrain.data.formats import format_of_row, to_example
from llmtrain.data.listing import list_entries
from llmtrain.data.raft import Prompt, RaftWriter
from llmtrain.data.rows import check_rows, read_rows
from llmtrain.data.sample import sample_rows
from llmtrain.data.template import open_template
from llmtrain.errors import (
    DONE,
    FAILED,
    REFUSED,
    STOPPED,
    ConfigError,
    TrainingError,
    is_disk_full,
)
from llmtrain.prepare import add_options

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """examples:
  python -m llmtrain.data list --language zh --for 1b
  python -m llmtrain.data recommend 7b --hardware a800x8
  python -m llmtrain.data download wikitext
  python -m llmtrain.data inspect mine.jsonl --tokenizer FOLDER
"""
MOST_REASONS = 5
BAR_WIDTH = 40
NUM_BINS = 10
PLAIN_PROMPT = Prompt(user="{documents}\n\n{question}", document="[{number}] {content}")


def main(words: list[str] | None = None) -> int:
    """Do what the command line says, and return the exit code."""
    arguments = parser().parse_args(words)
    try:
        arguments.do(arguments)
    except (ConfigError, TrainingError) as error:
        print(error, file=sys.stderr)
        return REFUSED if isinstance(error, ConfigError) else FAILED
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"{error}. Make room: the same command continues.", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Stopped. The same command continues.", file=sys.stderr)
        return STOPPED
    return DONE


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    options = argparse.ArgumentParser(
        prog="python -m llmtrain.data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = options.add_subparsers(
        required=True, metavar="list|recommend|download|prepare|inspect|sample"
    )
    add_catalogue(commands)
    add_options(commands.add_parser("prepare", help="tokenise, before any GPU is taken"))
    add_rows(commands)
    return options


def add_catalogue(commands: Any) -> None:
    """What is to be had elsewhere: list, recommend, download."""
    listing = commands.add_parser("list", help="data sets that others published, by name")
    listing.add_argument("--language", help="en, zh or code")
    listing.add_argument("--for", dest="size", metavar="SIZE", help="a model's size: 350m, 1b, 7b")
    listing.add_argument("--format", default="table", choices=["table", "json"])
    listing.set_defaults(do=list_entries)
    advising = commands.add_parser("recommend", help="a mixture for a model's size")
    advising.add_argument("size", help="a number of parameters (350m, 1b, 7b), or a model preset")
    advising.add_argument("--hardware", default="a800x8", help="a hardware preset: for the days")
    advising.add_argument("--language", default="en", help="en, or zh for mostly Chinese")
    advising.set_defaults(do=advise)
    loading = commands.add_parser("download", help="a data set, or --model: weights")
    loading.add_argument("name", nargs="?", help="a name that `list` shows")
    loading.add_argument("--model", metavar="NAME", help="a model preset, or org/name, for weights")
    loading.add_argument("--to", metavar="DIR", help="where to; without: into the cache")
    loading.add_argument("--tokens", help="a part of about so many tokens: 500m, 20b")
    loading.add_argument(
        "--from", dest="source", default="huggingface", choices=["huggingface", "modelscope"]
    )
    loading.add_argument("--id", metavar="ORG/NAME", help="another copy with the same files")
    loading.set_defaults(do=download)


def advise(arguments: argparse.Namespace) -> None:
    """Recommend a mixture; the planner that this needs stands above the data."""
    from llmtrain.recommend import recommend

    recommend(arguments)


def add_rows(commands: Any) -> None:
    """What is here: inspect, sample."""
    inspecting = commands.add_parser(
        "inspect", help="formats, counts, lengths, and what is learned"
    )
    inspecting.add_argument("path", help=".json, .jsonl, .parquet, a folder of them, or org/name")
    inspecting.add_argument("--tokenizer", help="a model's folder or hub name; without: characters")
    inspecting.add_argument("--template", help="a chat template in place of the tokenizer's own")
    inspecting.add_argument("--seq-len", type=int, default=2048, help="where rows are cut")
    inspecting.add_argument("--loss-on", default="assistant", choices=[on.value for on in LossOn])
    inspecting.set_defaults(do=inspect)
    sampling = commands.add_parser("sample", help="write an example file of a format, to copy")
    sampling.add_argument("format", help="alpaca, sharegpt, messages, prompt, text or raft")
    sampling.add_argument("--out", help="a .json or .jsonl file; without: the terminal")
    sampling.set_defaults(do=sample)


def sample(arguments: argparse.Namespace) -> None:
    """Write rows of a format."""
    rows = sample_rows(arguments.format)
    out = Path(arguments.out).expanduser() if arguments.out else None
    if out is not None and out.exists():
        raise ConfigError("--out", out, "exists", "give another name")
    if out is not None and out.suffix not in (".json", ".jsonl"):
        raise ConfigError("--out", out, "is no .json or .jsonl file", "give another name")
    if out is not None and out.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    if out is None:
        print(text, end="")
    else:
        write(out, text)
        print(f"{len(rows)} rows of format {arguments.format} in {out}")


def write(out: Path, text: str) -> None:
    """Write a file; ConfigError where that is not possible."""
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise ConfigError("--out", out, reason, "give another name") from None


def inspect(arguments: argparse.Namespace) -> None:
    """Print what training would make of a file."""
    from rich.console import Console

    check_rows(arguments.path, "path")
    console = Console(highlight=False)
    formats, bad, examples = read(arguments.path)
    console.print(f"[bold]{arguments.path}[/]")
    for name, count in formats.most_common():
        console.print(f"  format {name}: {count:,} rows")
    if bad:
        console.print(f"[red]{len(bad):,} bad rows[/] (data.on_bad_row=skip leaves them out):")
    for error in bad[:MOST_REASONS]:
        console.print(f"  {error}", style="red", markup=False, soft_wrap=True)
    if not examples:
        raise ConfigError("path", arguments.path, "has no row to learn from", "correct its rows")
    show_lengths(arguments, examples, console)


def read(path: str) -> "tuple[Counter[str], list[ConfigError], list[Example]]":
    """Formats with their counts, what is wrong, and the examples."""
    formats: Counter[str] = Counter()
    bad: list[ConfigError] = []
    examples = []
    raft = RaftWriter(PLAIN_PROMPT, [], 0.0, 0)
    for row in read_rows(path, bad.append, "path"):
        name = format_of_row(row.values)
        formats[name] += 1
        convert = raft.example if name == "raft" else to_example
        try:
            examples.append(convert(row.values, row.place, "path"))
        except ConfigError as error:
            bad.append(error)
    return formats, bad, examples


def show_lengths(
    arguments: argparse.Namespace, examples: list[Example], console: "Console"
) -> None:
    """Lengths as a histogram, what is cut, and one example with its mask in colour."""
    if arguments.tokenizer is None:
        show_histogram([characters(example) for example in examples], "characters", console)
        console.print("  give --tokenizer for tokens, cuts and the loss mask", style="dim")
        return
    from tempfile import TemporaryDirectory

    from llmtrain.data.tokenizer import vocabulary_at

    with TemporaryDirectory() as cache:
        folder = vocabulary_at(arguments.tokenizer, "--tokenizer", Path(cache)).folder
        show_tokens(arguments, folder, examples, console)


def show_tokens(
    arguments: argparse.Namespace, folder: Path, examples: list[Example], console: "Console"
) -> None:
    from llmtrain.data.encoding import Encoder
    from llmtrain.data.tokenizer import open_vocabulary

    template = open_template(folder, arguments.template)
    loss_on = LossOn(arguments.loss_on)
    documents = [Document(item.id, *template.rendered(item, loss_on)) for item in examples]
    encoded = Encoder(open_vocabulary(folder), np.dtype("int64"))(documents)
    lengths = [len(ids) for ids, _ in encoded]
    show_histogram(lengths, "tokens", console)
    num_cut = sum(length > arguments.seq_len + 1 for length in lengths)
    learned = sum(int(mask.sum()) for _, mask in encoded if mask is not None)
    console.print(f"  {num_cut:,} rows are longer than --seq-len {arguments.seq_len} and are cut")
    console.print(
        f"  {learned:,} of {sum(lengths):,} tokens are learned ({learned / sum(lengths):.0%})"
    )
    show_mask(documents[0], examples[0].place, console)


def show_mask(document: Document, place: str, console: "Console") -> None:
    """One example, what is learned in green."""
    from rich.text import Text

    text = Text(document.text, style="dim")
    for start, stop in document.learned or ():
        text.stylize("not dim bold green", start, stop)
    console.print(f"\n[bold]{place}[/], learned in [bold green]green[/]")
    console.print(text, soft_wrap=True)


def show_histogram(lengths: list[int], unit: str, console: "Console") -> None:
    """Counts of lengths in equal bins."""
    top = max(lengths)
    width = max(1, -(-top // NUM_BINS))
    counts = Counter((length - 1) // width for length in lengths)
    ordered = sorted(lengths)
    middle, high = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    console.print(
        f"  {len(lengths):,} rows, {unit}: median {middle:,}, 99 % {high:,}, longest {top:,}"
    )
    for number in range(-(-top // width)):
        count = counts[number]
        bar = "█" * round(BAR_WIDTH * count / max(counts.values()))
        console.print(f"  {number * width + 1:>7,} - {(number + 1) * width:>7,}  {bar} {count:,}")


def characters(example: Example) -> int:
    texts = [example.prompt, example.completion, *(turn.content for turn in example.messages)]
    return sum(map(len, texts))


if __name__ == "__main__":
    sys.exit(main())
