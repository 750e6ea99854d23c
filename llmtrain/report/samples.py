"""What the best runs and the worst wrote to the same prompt, side by side."""

from collections import Counter
from dataclasses import dataclass

from llmtrain.report.comparison import Comparison
from llmtrain.report.record import Run

BEST, WORST = 3, 1  # runs
MOST_TEXTS = 3  # of a single run
MOST_CHARACTERS = 1200
MOST_PROMPT = 600


@dataclass(frozen=True)
class Sample:
    """One column: whose text it is, and when it was written."""

    title: str
    note: str
    text: str


@dataclass(frozen=True)
class Samples:
    """Texts that go on from one prompt."""

    prompt: str
    texts: list[Sample]


def samples(comparison: Comparison) -> Samples | None:
    """Texts of the best runs and of the worst; of a single run those over time."""
    writers = [run for run in comparison.ranked if run.samples]
    if not writers:
        return None
    if len(writers) == 1:
        return over_time(writers[0])
    prompt = most_frequent([run.samples[-1]["prompt"] for run in writers])
    return Samples(cut(prompt, MOST_PROMPT), side_by_side(comparison, writers, prompt))


def most_frequent(prompts: list[str]) -> str:
    return Counter(prompts).most_common(1)[0][0]


def over_time(run: Run) -> Samples:
    """The first text of a run, one of the middle, and the last."""
    prompt = run.samples[-1]["prompt"]
    same = [row for row in run.samples if row["prompt"] == prompt]
    places = sorted({0, len(same) // 2, len(same) - 1})[-MOST_TEXTS:]
    texts = [Sample(f"step {same[i]['step']}", "", cut(same[i]["text"])) for i in places]
    return Samples(cut(prompt, MOST_PROMPT), texts)


def side_by_side(comparison: Comparison, writers: list[Run], prompt: str) -> list[Sample]:
    """The last texts to a prompt, of the first runs and of the last that ended."""
    done = {id(run) for run in comparison.finished}
    same = [run for run in writers if any(row["prompt"] == prompt for row in run.samples)]
    ended = [run for run in same if id(run) in done] or same
    chosen = [*ended[:BEST], *ended[BEST:][-WORST:]]
    return [sample(comparison, run, prompt, run is not ended[-1]) for run in chosen]


def sample(comparison: Comparison, run: Run, prompt: str, is_good: bool) -> Sample:
    row = [row for row in run.samples if row["prompt"] == prompt][-1]
    value = comparison.value(run)
    outcome = (
        "" if value is None else f"{comparison.objective.title} {comparison.objective.show(value)}"
    )
    place = comparison.ranked.index(run)
    rank = "best" if place == 0 else f"{ordinal(place + 1)}" if is_good else "worst"
    note = ", ".join(part for part in (rank, outcome, f"step {row['step']}") if part)
    return Sample(comparison.label(run), note, cut(row["text"]))


def ordinal(place: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(place, f"{place}th")


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
