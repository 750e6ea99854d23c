"""Two real runs on this machine's GPUs: `python -m benchmarks.gpu_runs [--out benchmarks/results]`.

A 1B Llama and a 1B Mamba-2, some steps each, through the same command that a user types. Writes
tokens/s, MFU and peak memory of the last record, with the device and the versions, to
<out>/<date>-<device>/runs.json. Needs a GPU; without one it says so and exits 2.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

from llmtrain.folder import RunFolder, write_json
from llmtrain.hardware import visible_gpus
from llmtrain.metrics import read_records

MODELS = ("llama_1b", "mamba2_1b")
STEPS = 20
BATCH = 32  # sequences a step: enough for the rate, few enough for minutes


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = options.parse_args().out
    gpus = visible_gpus()
    if not gpus:
        print("No GPU is visible here: nothing was measured.", file=sys.stderr)
        return 2
    date = datetime.date.today().isoformat()
    place = out / f"{date}-{len(gpus)}x{gpus[0].name.replace(' ', '_')}"
    write_json(place / "runs.json", [measure(model, place) for model in MODELS])
    print((place / "runs.json").read_text())
    return 0


def measure(model: str, place: Path) -> dict[str, object]:
    """Train a model for some steps in a process of its own; its last record and its environment."""
    words = [
        f"model={model}",
        f"name=gpu_{model}",
        f"train.max_steps={STEPS}",
        f"train.global_batch={BATCH}",
        "train.log_every=5",
        f"checkpoint.every={STEPS}",
        f"output_root={place / 'outputs'}",
    ]
    command = [sys.executable, "-m", "llmtrain.run", *words]
    ended = subprocess.run(command, check=False)
    if ended.returncode:
        return {"model": model, "command": words, "exit_code": ended.returncode}
    (folder,) = (place / "outputs").glob(f"gpu_{model}-*")
    run = RunFolder(folder)
    steps = [record for record in read_records(run.metrics) if "loss" in record]
    environment = json.loads(run.environment.read_text())
    return {"model": model, "command": words, "last": steps[-1], "environment": environment}


if __name__ == "__main__":
    sys.exit(main())
