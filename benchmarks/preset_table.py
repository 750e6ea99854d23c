"""The PAGE's table of model presets: what each needs, by the planner.

    python -m benchmarks.preset_table

Traces every preset without its values (a few minutes the first time, seconds from the cache) and
writes the tables between the two marks in PAGE.md. Nothing is downloaded or trained, and no GPU
is needed.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from llmtrain.compose import choices, composed
from llmtrain.config import RunConfig
from llmtrain.hardware import Hardware
from llmtrain.plan import Plan, make_plan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "presets.md"
MARKS = "<!-- presets -->", "<!-- /presets -->"
SEQ_LEN = 2048
FIXED = (
    "optimizer=adamw",
    "train.micro_batch=1",
    "train.global_batch=8",
    "train.activation_checkpointing=full",
    "zero.stage=0",
    "zero.offload_optimizer=none",
    "zero.offload_params=none",
)
WAYS = {
    "pretrain": ("mode=pretrain",),
    "sft": ("mode=sft",),
    "LoRA": ("mode=sft", "adapter=lora"),
    "QLoRA": ("mode=sft", "adapter=qlora"),
}
ON_A_CARD = ("pretrain", "LoRA", "QLoRA")  # full sft takes what pretraining takes
CARDS = {  # the smallest first; of those of one size, one
    "t4x1": "T4",
    "v100_16gx1": "V100 16 GB",
    "rtx3090x1": "RTX 3090",
    "v100_32gx6": "V100 32 GB",
    "a100_40gx1": "A100 40 GB",
    "a800x1": "A800",
    "h200x1": "H200",
}
ROOMY_CARD = "a800x1"  # for the figures, whether they fit it or not
KNOWN_GB = {1: 18, 2: 24, 4: 32}  # Qwen2.5-7B, LoRA of rank 64, by batch, as others published
KNOWN_LENGTHS = (512, 1024, 2048)


HEAD = [
    "model",
    "architecture",
    "parameters",
    *WAYS,
    *(f"{way} fits" for way in ON_A_CARD),
]
RULE = ["---", "---", "--:", *["--:"] * len(WAYS), *["---"] * len(ON_A_CARD)]


def listed() -> list[str]:
    """The presets of the table: those that name a model, of the tiny ones one."""
    named = [name for name in choices("model") if name != "pretrained"]
    return [name for name in named if name == "llama_tiny" or not name.endswith("_tiny")]


def family_and_size(name: str) -> tuple[str, int]:
    config = config_of(name, "pretrain")
    return config.model.architecture, config.model.facts(config.cache).num_parameters


def row(name: str) -> str:
    """A preset's line of the table."""
    plans = {way: plan_of(name, way, ROOMY_CARD) for way in WAYS}
    architecture = config_of(name, "pretrain").model.architecture
    cells = [f"`{name}`", architecture, parameters(plans["pretrain"])]
    cells += [f"{needed_gib(plan):.1f}" for plan in plans.values()]
    cells += [smallest_card(name, way, plans[way]) for way in ON_A_CARD]
    return line(cells)


def plan_of(name: str, way: str, card: str) -> Plan:
    """The plan of a preset on one card, with everything pinned that could be chosen."""
    return make_plan(replace(config_of(name, way), hardware=one_card(card)))


@cache
def config_of(name: str, way: str) -> RunConfig:
    words = [f"model={name}", *WAYS[way], *FIXED]
    config = composed(words)
    most = config.model.facts(config.cache).max_seq_len or SEQ_LEN
    return composed([*words, f"train.seq_len={min(SEQ_LEN, most)}"])


@cache
def one_card(name: str) -> Hardware:
    return composed([f"hardware={name}", "hardware.gpus_per_node=1"]).hardware


def needed_gib(plan: Plan) -> float:
    """The card's memory that a run takes: its tensors, CUDA and the allocator's slack."""
    memory = plan.memory
    return float(memory["device_peak_gib"] + memory["reserved_gib"])


def smallest_card(name: str, way: str, plan: Plan) -> str:
    """The first card, from the smallest up, on which the plan fits."""
    for card, title in CARDS.items():
        hardware = one_card(card)
        assert hardware.memory_gib is not None
        roomy = 1.1 * hardware.memory_gib > needed_gib(plan)  # others need not be planned
        if roomy and plan_of(name, way, card).fits:
            return title
    return "none"


def parameters(plan: Plan) -> str:
    """``6.74B``, and how many of a mixture's a token uses."""
    used = plan.num_active_parameters
    active = f", {short(used)} active" if used != plan.num_parameters else ""
    return short(plan.num_parameters) + active


def short(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def known_table() -> Iterator[str]:
    """The planner's figures beside those that others published."""
    yield line(["batch", "published, GB", *(f"{length:,} tokens" for length in KNOWN_LENGTHS)])
    yield line(["--:"] * (2 + len(KNOWN_LENGTHS)))
    for batch, published in KNOWN_GB.items():
        yield line([str(batch), str(published), *(known_cell(batch, n) for n in KNOWN_LENGTHS)])


def known_cell(batch: int, length: int) -> str:
    """GB without recomputation and with it."""
    return " / ".join(f"{known_gb(batch, length, how):.1f}" for how in ("none", "full"))


def known_gb(batch: int, length: int, recompute: str) -> float:
    words = ["model=qwen2_5_7b", *WAYS["LoRA"], *FIXED, f"hardware={ROOMY_CARD}"]
    words += ["adapter.rank=64", f"train.seq_len={length}", f"train.micro_batch={batch}"]
    words += [f"train.activation_checkpointing={recompute}"]
    return needed_gib(make_plan(composed(words))) * 2**30 / 1e9


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table() -> Iterator[str]:
    yield line(HEAD)
    yield line(RULE)
    for name in sorted(listed(), key=family_and_size):
        print(name, file=sys.stderr, flush=True)
        yield row(name)


def text() -> str:
    """What stands between the marks."""
    return "\n".join([MARKS[0], "", *table(), "", KNOWN, "", *known_table(), "", MARKS[1]])


def main() -> None:
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(before + text() + after)


KNOWN = """A table that others published, beside the planner's own: Qwen2.5-7B in bf16 with LoRA of
rank 64. They did not say how long their sequences were. The planner's figures are for three
lengths: without recomputation / with it. Both are in GB (1 GiB is 1.074 GB)."""

if __name__ == "__main__":
    main()
