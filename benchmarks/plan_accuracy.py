"""What a plan says beside what is measured, over many configurations on this machine's CPU.

    python -m benchmarks.plan_accuracy [--only SUBSTRING] [--list] [--again] [--plan-only]

Each configuration (benchmarks.plan_cases) is planned, and trained for some steps in fresh rank
processes. Three figures are compared: bytes of live tensors at the peak of a step, the resident
high-water mark of a rank beyond its imports, and the seconds of a step. Of several ranks the one
that takes most counts. Writes results/<date>-<machine>/plan_accuracy.json and .md after each
configuration. What was measured with the same words and versions is not measured again, unless
with --again; --plan-only measures nothing, and plans anew what was measured.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.plan_cases import Case, all_cases, save_models
from llmtrain.config import RunConfig
from llmtrain.data.shards import Manifest, prepare
from llmtrain.errors import DONE, FAILED
from llmtrain.folder import write_json, write_text
from llmtrain.hardware import cpu_name
from llmtrain.job import Job
from llmtrain.plan import Plan, make_plan

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "deepspeed", "peft")

Values = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What is compared: a number of a plan, and that of what a rank measured."""

    title: str
    planned: Callable[[Values], float | None]
    measured: Callable[[Values], float]


@dataclass(frozen=True)
class Comparison:
    """What is compared on a kind of machine; ``name`` is the module's, and that of its files."""

    name: str
    machine: str
    device_name: str
    cases: list[Case]
    figures: tuple[Figure, ...]
    what: str


def peak_of(title: str) -> Figure:
    """The most that a device has held at once: of a CPU resident, of a GPU allocated."""
    return Figure(
        title,
        lambda plan: plan["memory"]["device_peak_gib"],
        lambda rank: rank["memory_gib"]["trained"],
    )


LIVE = Figure(
    "live tensors",
    lambda plan: plan["memory"].get("live_gib"),
    lambda rank: rank["live_gib"]["peak"],
)
SECONDS = Figure(
    "seconds a step", lambda plan: plan["step_seconds"], lambda rank: rank["step_seconds"]
)


def main() -> int:
    assert __doc__ is not None
    comparison = Comparison(
        name="plan_accuracy",
        machine=platform.machine(),
        device_name=cpu_name(),
        cases=all_cases(),
        figures=(LIVE, peak_of("resident"), SECONDS),
        what="Live tensors and resident memory (beyond the imports) in GiB, of the rank that takes "
        "most.",
    )
    return compare(comparison, parse_options(__doc__))


def parse_options(description: str) -> argparse.Namespace:
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=usage)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of a name in --list")
    parser.add_argument("--list", action="store_true", help="name the configurations and stop")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--plan-only", action="store_true", help="measure nothing")
    parser.add_argument("--minutes", type=float, default=inf, help="begin nothing after so long")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=Path("outputs/plan_accuracy"))
    return parser.parse_args()


def compare(comparison: Comparison, options: argparse.Namespace) -> int:
    """Take every configuration that is asked for; the exit code."""
    cases = [each for each in comparison.cases if options.only in each.name]
    if options.list:
        print("\n".join(each.name for each in cases))
        return DONE
    end = time.monotonic() + 60 * options.minutes
    bench = Bench(comparison, options)
    for each in cases:
        if time.monotonic() < end:
            bench.take(each)
    print(summary(bench.rows, comparison), bench.place, sep="\n")
    return FAILED if any("error" in row for row in bench.rows) else DONE


def place_of(comparison: Comparison, options: argparse.Namespace) -> Path:
    """The newest results of this machine, which are added to; today's for a whole new table."""
    found = sorted(options.out.glob(f"*-{comparison.machine}/{comparison.name}.json"))
    is_new = options.again and not options.only
    today: Path = options.out / f"{date.today()}-{comparison.machine}"
    return found[-1].parent if found and not is_new else today


class Bench:
    """Plans and measures, and writes down each row at once."""

    def __init__(self, comparison: Comparison, options: argparse.Namespace) -> None:
        self.comparison, self.options = comparison, options
        self.work: Path = options.work.absolute()
        self.place = place_of(comparison, options)
        self.stored = self.read()
        self.rows: list[Values] = []

    @property
    def file(self) -> Path:
        return self.place / f"{self.comparison.name}.json"

    def read(self) -> dict[tuple[str, ...], Values]:
        """The rows that were written down, by their words."""
        rows = json.loads(self.file.read_text())["rows"] if self.file.exists() else []
        return {tuple(row["words"]): row for row in rows}

    def take(self, case: Case) -> None:
        """The row of a configuration: its figures, or why there are none."""
        start = time.perf_counter()
        row: Values = {"name": case.name, "words": list(case.words)}
        try:
            row |= self.compared(case)
        except Exception as error:  # the other configurations go on
            traceback.print_exc()
            row |= {"error": " ".join(str(error).split())}
        self.rows.append(row)
        self.write()
        line = told(row, self.comparison)
        print(f"{time.perf_counter() - start:5.1f} s  {row['name']}: {line}", flush=True)

    def compared(self, case: Case) -> Values:
        """What was planned, what is measured, and on what."""
        models = self.work / "models"
        save_models(case.stored, models)
        config = case.composed(models, "name=accuracy", f"output_root={self.work / 'runs'}")
        manifest = prepare(config.data, config.cache, config.tokenizer_path, progress=False)
        plan = make_plan(config, manifest)
        planned = {"step_seconds": plan.step_seconds, "memory": plan.memory}
        return {"planned": planned} | self.measured(case, config, plan, manifest)

    def measured(self, case: Case, config: RunConfig, plan: Plan, manifest: Manifest) -> Values:
        """What was measured before, or is now."""
        row = self.stored.get(case.words, {})
        is_known = "measured" in row and row["versions"] == versions()
        if self.options.plan_only or (is_known and not self.options.again):
            return {key: row[key] for key in ("measured", "versions", "date") if key in row}
        ranks = measure(Job(config, plan, manifest))
        return {"measured": ranks, "versions": versions(), "date": str(date.today())}

    def write(self) -> None:
        """The table so far, with the rows that this call has not come to."""
        known = self.read() | {tuple(row["words"]): row for row in self.rows}
        rows = [known[case.words] for case in self.comparison.cases if case.words in known]
        head = {"machine": self.comparison.device_name, "platform": platform.platform()}
        write_json(self.file, head | {"versions": versions(), "rows": rows})
        write_text(self.file.with_suffix(".md"), page(rows, self.comparison))


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def measure(job: Job) -> list[Values]:
    """What each rank saw of a run, in processes that start as those of any run."""
    from benchmarks.plan_accuracy_rank import result_of  # imports torch
    from llmtrain.training import library_settings

    shutil.rmtree(job.folder.path, ignore_errors=True)
    job.fill_folder()
    command = [sys.executable, "-u", "-m", "benchmarks.plan_accuracy_rank", str(job.folder.path)]
    ended = job.config.launcher.launch(
        command,
        job.folder,
        ranks=job.plan.gpus_per_node,
        threads=job.plan.threads_per_rank,
        environment=library_settings(job.config, job.plan.device),
        watch=lambda: None,
    )
    if ended.was_stopped:
        sys.exit(FAILED)
    if ended.was_cut_short:
        raise RuntimeError(job.training().cause(ended))
    ranks = range(job.plan.world_size)
    return [json.loads(result_of(job.folder, rank).read_text()) for rank in ranks]


def pair(row: Values, figure: Figure) -> tuple[float | None, float | None]:
    """What was planned, and what the rank that takes most measured."""
    planned = figure.planned(row["planned"]) if "planned" in row else None
    return planned, most(map(figure.measured, row.get("measured", [])))


def most(values: Iterable[float]) -> float | None:
    return max(values, default=None)


def relative(planned: float | None, found: float | None) -> float | None:
    """The error of a plan; None where one of the two is missing."""
    return planned / found - 1 if planned and found else None


def cells(row: Values, figure: Figure) -> list[str]:
    """Planned, measured and error."""
    planned, found = pair(row, figure)
    error = relative(planned, found)
    values = ["-" if value is None else f"{value:.3f}" for value in (planned, found)]
    return [*values, "-" if error is None else f"{error:+.1%}"]


def told(row: Values, comparison: Comparison) -> str:
    """A row in one line for the terminal."""
    if "error" in row:
        return str(row["error"])
    parts = {figure.title: cells(row, figure) for figure in comparison.figures}
    return ", ".join(f"{name} {a} of {b} ({error})" for name, (a, b, error) in parts.items())


def summary(rows: list[Values], comparison: Comparison) -> str:
    """The errors of each figure as a table in Markdown."""
    lines = ["| error | median | worst | lowest | highest | rows |", "|---|--:|--:|--:|--:|--:|"]
    for figure in comparison.figures:
        every = [relative(*pair(row, figure)) for row in rows]
        if found := [error for error in every if error is not None]:
            sizes = [abs(error) for error in found]
            ends = f"{median(sizes):.1%} | {max(sizes):.1%} | {min(found):+.1%} | {max(found):+.1%}"
            lines.append(f"| {figure.title} | {ends} | {len(found)} |")
    return "\n".join(lines)


def page(rows: list[Values], comparison: Comparison) -> str:
    """The whole table in Markdown: how large the errors are, and each row."""
    dates = ", ".join(sorted({row["date"] for row in rows if "date" in row}))
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    titles = " | | | ".join(figure.title for figure in comparison.figures)
    num_cells = 3 * len(comparison.figures)
    columns = " | ".join(["planned", "measured", "error"] * len(comparison.figures))
    lines = [
        "# Plans beside measurements",
        "",
        f"`python -m benchmarks.{comparison.name}` of {dates} on {comparison.device_name}; "
        f"{packages}.",
        comparison.what,
        "",
        summary(rows, comparison),
        "",
        f"| | {titles} | | |",
        "|---" + "|---:" * num_cells + "|",
        f"| configuration | {columns} |",
        *(f"| {row['name']} | {content(row, comparison)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def content(row: Values, comparison: Comparison) -> str:
    """A row's cells, or why there are none."""
    if "error" in row:
        return str(row["error"]).replace("|", "/")
    return " | ".join(cell for figure in comparison.figures for cell in cells(row, figure))


if __name__ == "__main__":
    sys.exit(main())
