"""How long a report takes to build, and how large its page is.

    python -m benchmarks.report [--runs 1 12 300] [--steps 2000]

Run folders are made up, with a record for every second step. Seconds are those of the whole
command, from its start to the page on the disk, by the clock and of a processor.
Writes results/<date>-<machine>/report.json and .md.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from typing import Any

from llmtrain.errors import DONE
from llmtrain.folder import write_json, write_text

HERE = Path(__file__).parent
ROUNDS = 5


def main() -> int:
    assert __doc__ is not None
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 12, 300])
    parser.add_argument("--steps", type=int, default=2000, help="of each run")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    keep(options, [measure(num_runs, options.steps) for num_runs in options.runs])
    return DONE


def measure(num_runs: int, num_steps: int) -> dict[str, Any]:
    """Build the page of so many runs, several times."""
    from tests.synthetic_runs import make_sweep

    with tempfile.TemporaryDirectory() as root:
        sweep = make_sweep(Path(root), num_runs, num_steps=num_steps)
        command = [sys.executable, "-m", "llmtrain.report", str(sweep)]
        times = [timed(command) for _ in range(ROUNDS)]
        num_bytes = (sweep / "report.html").stat().st_size
    seconds, cpu_seconds = zip(*times, strict=True)
    found = {"num_runs": num_runs, "seconds": seconds, "cpu_seconds": cpu_seconds}
    return found | {"num_bytes": num_bytes}


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds by the clock, and those that processors worked."""
    start, before = time.perf_counter(), worked_seconds()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, worked_seconds() - before


def worked_seconds() -> float:
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def keep(options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """Print and keep what was measured."""
    from llmtrain.hardware import cpu_name

    place = options.out / f"{date.today()}-{platform.machine()}" / "report"
    rows = [
        f"| {row['num_runs']} | {median(row['seconds']):.2f} | {median(row['cpu_seconds']):.2f} "
        f"| {row['num_bytes'] / 1e6:.2f} |"
        for row in found
    ]
    lines = [
        "# What a report takes",
        "",
        f"`python -m benchmarks.report --steps {options.steps}` of {date.today()} on {cpu_name()}, "
        f"beside other work: medians of {ROUNDS}. {options.steps // 2:,} records a run; plotly.js "
        "is 4.8 MB of each page.",
        "",
        "| runs | seconds | of a processor | MB |",
        "| --: | --: | --: | --: |",
        *rows,
    ]
    print("\n".join(lines))
    write_json(place.with_suffix(".json"), {"steps": options.steps, "pages": found})
    write_text(place.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
