"""Training speed on one GPU beside other trainers, as benchmarks.speed measures it on a CPU.

    python -m benchmarks.gpu --peers PYTHON WORK ...

Each work is a step of a few minutes. ``PYTHON`` has torch, transformers and accelerate; without a
network it may be this one's own. The product of reference, 8192 square in bf16, is measured in the
same run. Writes results/<date>-<device>/speed.json and .md. Needs a GPU; without one it says so
and exits 2.
"""

import sys

from benchmarks.speed import (
    COMPILED,
    LOOP_COMPILED,
    OURS,
    TRAINER,
    TRAINER_COMPILED,
    Work,
    measure_all,
    parse_options,
)
from llmtrain.errors import DONE, REFUSED
from llmtrain.hardware import visible_gpus

LONG = ["train.seq_len=16384", "train.global_batch=2"]
USUAL = ["train.seq_len=4096", "train.global_batch=8"]
WORKS = [
    Work(
        "llama_1b",
        ["model=llama_1b", *USUAL],
        (OURS, COMPILED, TRAINER, TRAINER_COMPILED, LOOP_COMPILED),
        goals={TRAINER: 1.5, "best peer": 1.1},
        peak_share=0.65,
        hardware="auto",
    ),
    Work("llama_1b_lora", ["model=llama_1b", "adapter=lora", *USUAL], (OURS,), hardware="auto"),
    Work("llama_8b", ["model=llama3_8b", *USUAL], (OURS,), steps=2, hardware="auto"),
    Work("llama_1b_long", ["model=llama_1b", *LONG], (OURS,), hardware="auto"),
    Work("mamba2_1b_long", ["model=mamba2_1b", *LONG], (OURS,), hardware="auto"),
]


def main() -> int:
    assert __doc__ is not None
    options, gpus = parse_options(__doc__, WORKS), visible_gpus()
    if not gpus:
        print("No GPU is visible here: nothing was measured.", file=sys.stderr)
        return REFUSED
    name = gpus[0].name
    measure_all(WORKS, options, name, name.replace(" ", "_"))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
