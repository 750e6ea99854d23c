"""What a plan says beside what is measured, on one GPU of this machine.

    python -m benchmarks.plan_on_gpu [--only SUBSTRING] [--list] [--again] [--minutes 7]

As benchmarks.plan_accuracy, with what torch has allocated at most in place of resident memory. No
configuration is begun after --minutes; the same command goes on with the rest. Writes
results/<date>-<device>/plan_on_gpu.json and .md. Needs a GPU; without one it says so and exits 2.
"""

import sys
from dataclasses import replace

from benchmarks.plan_accuracy import LIVE, SECONDS, Comparison, compare, parse_options, peak_of
from benchmarks.plan_cases import STORED, Case, case
from llmtrain.errors import REFUSED
from llmtrain.hardware import visible_gpus

VOCABULARY = "data.tokenizer.vocab_size=4096"  # of the tokens, not of the model: soon made


def main() -> int:
    assert __doc__ is not None
    options = parse_options(__doc__)
    gpus = visible_gpus()
    if not gpus and not options.list:
        print("No GPU is visible here: nothing was measured.", file=sys.stderr)
        return REFUSED
    name = gpus[0].name if gpus else "no GPU"
    comparison = Comparison(
        name="plan_on_gpu",
        machine=f"1x{name.replace(' ', '_')}",
        device_name=name,
        cases=[on_gpu(each) for each in [*from_presets(), *from_weights()]],
        figures=(LIVE, peak_of("allocated"), SECONDS),
        what="Live tensors and what torch has allocated at most in GiB.",
    )
    return compare(comparison, options)


def on_gpu(case: Case) -> Case:
    """The same configuration on one GPU of this machine."""
    others = [word for word in case.words if not word.startswith("hardware=")]
    return replace(case, words=("hardware=auto", "hardware.gpus_per_node=1", *others))


def from_presets() -> list[Case]:
    adamw, on_host = "optimizer=adamw", "zero.offload_optimizer=cpu"
    few_layers = "model.config.num_hidden_layers=4"
    return [
        case("llama_350m", "8x1024", 0, "bf16", VOCABULARY),
        case("llama_350m", "4x1024", 0, "fp32", adamw, VOCABULARY),
        case("llama_350m", "16x1024", 1, "bf16", adamw, VOCABULARY, accumulate=2),
        case("llama_1b", "4x2048", 1, "bf16", VOCABULARY),
        case("llama_1b", "8x2048", 2, "bf16", VOCABULARY, recompute="full"),
        case("llama_1b", "4x2048", 2, "bf16", on_host, VOCABULARY, accumulate=2),
        case("llama_1b", "4x2048", 0, "bf16_pure", VOCABULARY, recompute="2"),
        case("mamba_370m", "4x1024", 1, "bf16", adamw, VOCABULARY),
        case("mamba2_1b", "2x2048", 1, "bf16", VOCABULARY, recompute="full"),
        case("moe_1b_7b", "2x2048", 1, "bf16", few_layers, VOCABULARY),
    ]


def from_weights() -> list[Case]:
    """Adapters and a full fine-tuning, from weights that are saved here."""
    base, rows = f"{STORED}llama_1b", ("mode=sft", "data=stdlib_qa")
    return [
        case(base, "4x2048", 0, "bf16", "adapter=lora"),
        case(base, "8x1024", 1, "bf16", "adapter=lora", *rows, recompute="full"),
        case(base, "4x2048", 0, "bf16", "adapter=qlora"),
        case(base, "4x1024", 2, "bf16", *rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
