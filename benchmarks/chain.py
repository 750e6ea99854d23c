"""From nothing to a model that answers, on embedded data: pretrain, SFT with LoRA, distillation.

    python -m benchmarks.chain [--outputs outputs/chain]

Every step is a command that a user could type, printed before it runs. In between each step's
model is compared with the one before it, on rows that no step trained on. It ends with a table of
the scores and writes results/<date>-<machine>/chain.json. Killed, it continues where it was.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
NUM_ANSWERS = 64
NEW_TOKENS = 96
RAFT_SCORES = ["section_share", "quote_share", "uses_oracle", "f1", "reference_loss"]


@dataclass(frozen=True)
class Score:
    """A score before and after a step; with the 95 % interval of the difference where it is one."""

    step: str
    name: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None


class Chain:
    """The commands, in order, and how long they took."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        self.scores: list[Score] = []
        self.seconds: dict[str, float] = {}

    def run(self, step: str, module: str, *words: str) -> None:
        """Run a command of ours, its output on the terminal."""
        print(f"\n$ python -m llmtrain.{module} {shlex.join(words)}", flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", f"llmtrain.{module}", *words], check=True)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def train(self, step: str, *words: str) -> Path:
        """Train a step under its name; its run folder."""
        self.run(step, "run", *words, f"name={step}", f"output_root={self.outputs}")
        (folder,) = self.outputs.glob(f"{step}-*")
        return folder

    def compare(self, step: str, run: Path, before: Path, suite: str, names: list[str]) -> None:
        """Evaluate a step's model and the one before it on the same held-out rows."""
        out = self.outputs / f"{step}-{suite}.json"
        words = [str(run), "--suite", suite, "--baseline", str(before), "--out", str(out)]
        limits = ["--limit", str(NUM_ANSWERS), "--max-new-tokens", str(NEW_TOKENS)]
        self.run("evaluate", "evaluate", *words, *limits)
        found = json.loads(out.read_text())
        for name in names:
            values = (found["baseline_metrics"][name], found["metrics"][name])
            difference = found["comparison"][name]
            interval = (difference["low"], difference["high"])
            self.scores.append(Score(step, name, *values, *interval))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--outputs", type=Path, default=Path("outputs/chain"))
    chain = Chain(options.parse_args().outputs)
    chain.outputs.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    pretrained = pretrain(chain)
    taught = teach(chain, pretrained)
    distilled = distil(chain, taught)
    finish(chain, distilled)
    show(chain, time.perf_counter() - start)


def pretrain(chain: Chain) -> Path:
    """The default run; its score is bits per byte, at the first evaluation and at the end."""
    run = chain.train("pretrain")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bits = [each["eval_bits_per_byte"] for each in records if "eval_bits_per_byte" in each]
    chain.scores.append(Score("pretrain", "bits_per_byte", bits[0], bits[-1]))
    return run


def teach(chain: Chain, pretrained: Path) -> Path:
    """SFT with LoRA on the pretrained model, merged into a model of its own."""
    words = ["mode=sft", "data=stdlib_qa", "adapter=lora"]
    run = chain.train("sft", *words, "model=pretrained", f"model.path={pretrained / 'final'}")
    chain.compare("sft", run, pretrained / "final", "answers", ["f1", "rouge_l", "reference_loss"])
    merged = run / "export" / "merged"
    if not merged.exists():
        chain.run("export", "export", str(run), "--to", "merged")
    return merged


def distil(chain: Chain, taught: Path) -> Path:
    """Answers from documents, learned from a teacher's, on top of the fine-tuned model."""
    words = ["mode=distill", "data=stdlib_raft", "train.max_epochs=1"]
    run = chain.train("distill", *words, "model=pretrained", f"model.path={taught}")
    chain.compare("distill", run, taught, "raft", RAFT_SCORES)
    return run


def finish(chain: Chain, run: Path) -> None:
    """Ask the model, export it, and open it with transformers alone."""
    chain.run("generate", "generate", str(run), "--sample", "--temperature", "0")
    exported = run / "export" / "safetensors"
    if not exported.exists():
        chain.run("export", "export", str(run), "--to", "safetensors", "--dtype", "bf16")
    program = (
        "from transformers import pipeline\n"
        f"model = pipeline('text-generation', {str(exported)!r}, device='cpu')\n"
        "turn = {'role': 'user', 'content': 'What does shutil.copytree do?'}\n"
        "print(model([turn], max_new_tokens=40)[0]['generated_text'][-1]['content'])\n"
    )
    print(f"\n$ python -c {shlex.quote(program)}", flush=True)
    subprocess.run([sys.executable, "-c", program], check=True)


def show(chain: Chain, seconds: float) -> None:
    """The table of scores, and the same as JSON."""
    table = Table(title=f"{seconds / 60:.1f} minutes in all", title_justify="left", box=None)
    for column in ("step", "score", "before", "after", "95 % of the difference"):
        table.add_column(column)
    for score in chain.scores:
        has_interval = score.low is not None and score.high is not None
        interval = f"{score.low:+.3f} to {score.high:+.3f}" if has_interval else ""
        values = (f"{score.before:.3f}", f"{score.after:.3f}")
        table.add_row(score.step, score.name, *values, interval)
    Console().print(table)
    folder = RESULTS / f"{date.today()}-{platform.machine()}"
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "seconds": seconds,
        "seconds_of_steps": chain.seconds,
        "scores": [asdict(score) for score in chain.scores],
    }
    (folder / "chain.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
