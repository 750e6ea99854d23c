"""Whether a teacher helps: a small student alone and with a larger teacher, on the same tokens.

    python -m benchmarks.distillation [--tokens 200000] [--teacher-tokens 500000] [--seeds 3]

A 23M Llama is pretrained on the embedded corpus and becomes the teacher. For each seed a 6M Llama
is trained alone, and again from its logits: same initial weights, same batches in the same order,
same optimizer. Held-out losses are plain cross-entropy on documents that neither has seen. It
ends with a table and writes results/<date>-<machine>/distillation.json; killed, it continues.
"""

import argparse
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
TEACHER = ["model.config.hidden_size=512"]
METHOD = ["mode=distill", "mode.method=logits", "model@teacher=pretrained", "data=stdlib"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--outputs", type=Path, default=Path("outputs/distillation"))
    options.add_argument("--tokens", type=int, default=200_000)
    options.add_argument("--teacher-tokens", type=int, default=500_000)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--alpha", type=float, default=0.5)
    arguments = options.parse_args()
    teacher = train(
        arguments.outputs, "teacher", *TEACHER, f"train.max_tokens={arguments.teacher_tokens}"
    )
    pairs = [compare(arguments, teacher, seed) for seed in range(arguments.seeds)]
    show(arguments, held_out_loss(teacher), pairs)


def train(outputs: Path, name: str, *words: str) -> Path:
    """A run of the command under a name; its folder."""
    command = [sys.executable, "-m", "llmtrain.run", f"name={name}", f"output_root={outputs}"]
    subprocess.run([*command, *words], check=True)
    (folder,) = outputs.glob(f"{name}-*")
    return folder


def compare(arguments: argparse.Namespace, teacher: Path, seed: int) -> tuple[float, float]:
    """Held-out loss of the student alone and taught, in nats a token."""
    shared = ["optimizer=muon", f"seed={seed}", f"train.max_tokens={arguments.tokens}"]
    alone = train(arguments.outputs, f"alone{seed}", *shared)
    taught_by = [*METHOD, f"teacher.path={teacher / 'final'}", f"mode.alpha={arguments.alpha}"]
    taught = train(arguments.outputs, f"taught{seed}", *shared, *taught_by, *same_recipe(alone))
    return held_out_loss(alone), held_out_loss(taught)


def same_recipe(alone: Path) -> list[str]:
    """The rate, lengths and batch of the run alone, said aloud."""
    plan = json.loads((alone / "plan.json").read_text())
    return [
        f"optimizer.lr={plan['learning_rate']}",
        f"train.seq_len={plan['seq_len']}",
        f"train.global_batch={plan['global_batch']}",
    ]


def held_out_loss(run: Path) -> float:
    return float(json.loads((run / "summary.json").read_text())["eval_loss"])


def show(
    arguments: argparse.Namespace, teacher_loss: float, pairs: list[tuple[float, float]]
) -> None:
    """The table of losses, and the same as JSON."""
    table = Table(title=f"held-out loss (the teacher's: {teacher_loss:.4f})", box=None)
    for column in ("seed", "alone", "taught", "difference"):
        table.add_column(column)
    for seed, (alone, taught) in enumerate(pairs):
        table.add_row(str(seed), f"{alone:.4f}", f"{taught:.4f}", f"{taught - alone:+.4f}")
    Console().print(table)
    folder = RESULTS / f"{date.today()}-{platform.machine()}"
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "tokens": arguments.tokens,
        "teacher_tokens": arguments.teacher_tokens,
        "alpha": arguments.alpha,
        "teacher_loss": teacher_loss,
        "seeds": [{"alone": alone, "taught": taught} for alone, taught in pairs],
    }
    (folder / "distillation.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
