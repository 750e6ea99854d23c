"""Draws the README's pictures of a finished run: what the terminal showed, and the loss curve.

    pip install matplotlib
    python -m benchmarks.picture outputs/<run> [--out docs]

Every figure comes from the plan.json, metrics.jsonl and summary.json that the run left behind.
"""

import argparse
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from llmtrain.display import line_of, show_summary
from llmtrain.errors import DONE, REFUSED, ConfigError
from llmtrain.folder import RunFolder, write_text
from llmtrain.metrics import read_records
from llmtrain.plan import Plan
from llmtrain.plan.table import show_plan

COLUMNS = 100
MOST_LINES = 4  # of progress, at the beginning and again at the end
WEB_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)

TRAIN, HELD_OUT, XZ = "#9db8d2", "#c1442e", "#5b5b5b"


def main(words: list[str] | None = None) -> int:
    """Draw what the command line says, and return the exit code."""
    arguments = parser().parse_args(words)
    out, path = arguments.out.resolve(), Path(arguments.run).resolve()
    # Seen from above it is outputs/<run>: where it lies on this machine is nobody's business.
    os.chdir(path.parent.parent)
    folder = RunFolder(Path(*path.parts[-2:]))
    try:
        check(folder)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    plan, summary = Plan.load(folder.plan), json.loads(folder.summary.read_text())
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "run.svg", draw_terminal(folder, plan, summary))
    write_text(out / "loss.svg", draw_loss(folder, plan, summary))
    return DONE


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("run", help="the folder of a finished run")
    options.add_argument("--out", type=Path, default=Path("docs"), help="where the pictures go")
    return options


def check(folder: RunFolder) -> None:
    """Raise ConfigError for a run that has not ended and for a missing matplotlib."""
    if not folder.summary.exists():
        raise ConfigError("run", folder.path, "has no summary.json", "give a run that is done")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("picture", "loss.svg", "needs matplotlib", "run: pip install matplotlib")


def draw_terminal(folder: RunFolder, plan: Plan, summary: dict[str, Any]) -> str:
    """What the run printed, as an SVG: the plan, lines of progress and the summary."""
    written = recorder()
    show_run(folder, plan, summary, written)
    page = recorder()  # a second one, because an export cuts long lines off and print wraps them
    page.print(Text.from_ansi(written.export_text(styles=True)), overflow="fold")
    picture = page.export_svg(title=plan.name, theme=MONOKAI, unique_id="run")
    return WEB_FONT.sub("", picture)  # whoever looks at it shall not have to fetch anything


def recorder() -> Console:
    """A terminal of which only the recording is kept."""
    return Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="standard",
        no_color=False,
    )


def show_run(folder: RunFolder, plan: Plan, summary: dict[str, Any], console: Console) -> None:
    """Print the run again, from its command to its summary."""
    console.print(f"$ {command_of(folder)}\n", highlight=False, markup=False)
    show_plan(plan, console=console)
    console.print()
    for line in shortened([line_of(record, plan) for record in read_records(folder.metrics)]):
        console.print(line, soft_wrap=True)
    show_summary(folder, summary, console=console)


def command_of(folder: RunFolder) -> str:
    """The command that starts such a run."""
    words = folder.overrides.read_text().strip() if folder.overrides.exists() else ""
    return f'make run ARGS="{words}"' if words else "make run"


def shortened(lines: list[str]) -> list[str]:
    """The first and last lines, and how many stood between."""
    left_out = len(lines) - 2 * MOST_LINES
    if left_out < 2:
        return lines
    return [*lines[:MOST_LINES], f"... {left_out} lines ...", *lines[-MOST_LINES:]]


def draw_loss(folder: RunFolder, plan: Plan, summary: dict[str, Any]) -> str:
    """Training and held-out loss against tokens, as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": plan.name}
    from matplotlib import pyplot

    records = read_records(folder.metrics)
    train = [record for record in records if "loss" in record]
    held_out = [record for record in records if "eval_loss" in record]
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained", facecolor="white")
    axes.plot(*curve(train, "loss", plan), color=TRAIN, label="training")
    axes.plot(*curve(held_out, "eval_loss", plan), "o-", color=HELD_OUT, label="held out")
    draw_xz(axes, summary)
    axes.set(xlabel="tokens (millions)", ylabel="loss (nats per token)", xlim=(0, None))
    axes.set_title(f"{plan.name}: {plan.num_parameters / 1e6:,.2f}M parameters", loc="left")
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.StringIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return picture.getvalue()


def curve(records: list[dict[str, Any]], name: str, plan: Plan) -> tuple[list[float], list[float]]:
    """Millions of tokens, and the loss of that name after them."""
    millions = [record["step"] * plan.tokens_per_step / 1e6 for record in records]
    return millions, [record[name] for record in records]


def draw_xz(axes: Any, summary: dict[str, Any]) -> None:
    """The loss at which the model's bits per byte are those of xz on the same held-out text.

    Nats per token and bits per byte differ by a factor that is the text's and the tokenizer's. It
    is left out where the closing evaluation did not read all of that text.
    """
    bits = summary["xz_bits_per_byte"]
    if bits is None or not summary["held_out_is_whole"]:
        return
    loss = bits * summary["eval_loss"] / summary["eval_bits_per_byte"]
    axes.axhline(loss, color=XZ, linestyle="--", label=f"xz -9, {bits:.2f} bits per byte")


if __name__ == "__main__":
    sys.exit(main())
