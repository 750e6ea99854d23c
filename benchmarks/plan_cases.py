"""The configurations of benchmarks.plan_accuracy, and the saved models that some start from.

Each pins what a plan would choose (ZeRO stage, precision, micro-batch, recomputation), so that
what was planned is what is measured.
"""

# B sequences of a micro-batch, L length

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.compose import composed
from llmtrain.config import RunConfig
from llmtrain.data.shards import prepare

FAMILIES = ("llama_tiny", "moe_tiny", "mamba_tiny", "mamba2_tiny", "hybrid_tiny")
WIDTH, LAYERS, HEADS = 256, 4, 4
# Architectures that no preset has, by the names that their configurations give to sizes.
USUAL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
STRANGERS: dict[str, dict[str, Any]] = {
    "gemma2": USUAL | {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    "opt": USUAL | {"ffn_dim": 1024, "word_embed_proj_dim": WIDTH},
    "phi": USUAL | {"intermediate_size": 1024},
    "qwen3": USUAL | {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 768},
}
UNTOLD = ("data", "mode.", "model@", "teacher")  # words that a name does without
STORED = "STORED/"  # in a word: the folder of the models that are saved here


@dataclass(frozen=True)
class Case:
    """A configuration: what it is called, and the words that a user would type."""

    name: str
    words: tuple[str, ...]

    @property
    def stored(self) -> list[str]:
        """The saved models that it starts from."""
        return [word.partition(STORED)[2] for word in self.words if STORED in word]

    def composed(self, models: Path, *more: str) -> RunConfig:
        """Its config, with the models that it starts from in a folder."""
        words = [word.replace(STORED, f"{models}/") for word in self.words]
        return composed([*words, *more])


def case(
    model: str,
    size: str,
    stage: int = 0,
    precision: str = "fp32",
    *words: str,
    ranks: int = 1,
    recompute: str = "none",
    accumulate: int = 1,
) -> Case:
    """A preset, or a saved model where ``model`` begins with STORED; ``size`` is BxL."""
    batch, length = map(int, size.split("x"))
    start = [f"model={model}"]
    if model.startswith(STORED):
        start = ["model=pretrained", f"model.path={model}"]
    pinned = (
        f"hardware=cpux{ranks}",
        f"zero.stage={stage}",
        f"train.precision={precision}",
        f"train.micro_batch={batch}",
        f"train.seq_len={length}",
        f"train.global_batch={batch * ranks * accumulate}",
        f"train.activation_checkpointing={recompute}",
        "train.max_steps=1000",
        "checkpoint.asynchronous=false",  # none is saved
    )
    also = [] if recompute == "none" else [f"recompute {recompute}"]
    also += [f"{accumulate} micro-batches"] if accumulate > 1 else []
    also += [word for word in words if not word.startswith(UNTOLD)]
    spread = [f"ZeRO {stage}", f"{ranks} rank{'s' * (ranks > 1)}"]
    parts = [model.removeprefix(STORED), size, precision, *spread, *also]
    return Case(", ".join(parts), (*start, *pinned, *words))


def all_cases() -> list[Case]:
    """Every family spread in every way; then optimizers, sizes, strangers, adapters, a teacher."""
    families = [each for model in FAMILIES for each in spreads(model)]
    return [*families, *optimizers(), *lengths(), *larger(), *strangers(), *adapted(), *taught()]


def spreads(model: str) -> list[Case]:
    """The ZeRO stages, on one rank and on two, in both precisions."""
    adamw = "optimizer=adamw"
    return [
        case(model, "8x256"),
        case(model, "8x512", 0, "bf16", adamw, recompute="full"),
        case(model, "4x256", 1, "bf16", accumulate=2),
        case(model, "8x256", 2, "fp32", adamw, recompute="2"),
        case(model, "4x256", 1, "fp32", adamw, ranks=2),
        case(model, "4x256", 2, "bf16", adamw, ranks=2, accumulate=2),
        case(model, "4x512", 3, "bf16", adamw, ranks=2, recompute="full"),
        case(model, "4x256", 3, "fp32", adamw, ranks=2),
    ]


def optimizers() -> list[Case]:
    return [
        case("llama_tiny", "8x256", 0, "bf16_pure"),
        case("llama_tiny", "8x256", 0, "fp32", "optimizer=adafactor"),
        case("llama_tiny", "8x256", 1, "bf16", "optimizer=lion"),
        case("llama_tiny", "4x256", 2, "bf16", ranks=2),
    ]


def lengths() -> list[Case]:
    return [
        case("llama_tiny", "32x256"),
        case("llama_tiny", "4x1024", 0, "bf16"),
        case("mamba_tiny", "2x1024", 0, "bf16", accumulate=4),
        case("mamba2_tiny", "2x1024"),
    ]


def larger() -> list[Case]:
    """Models whose states weigh more than their activations."""
    vocabulary = "data.tokenizer.vocab_size=4096"
    return [
        case("llama_50m", "1x512", 0, "fp32", vocabulary),
        case("llama_50m", "2x512", 1, "bf16", vocabulary, recompute="full"),
        case("llama_50m", "1x512", 2, "bf16", "optimizer=adamw", vocabulary, ranks=2),
        case("llama_125m", "1x256", 1, "bf16", "optimizer=adamw", vocabulary),
        case("mamba_130m", "1x256", 0, "fp32", "optimizer=adamw", vocabulary),
    ]


def strangers() -> list[Case]:
    return [
        *(case(f"{STORED}{name}", "8x256") for name in STRANGERS),
        case(f"{STORED}gemma2", "4x1024", 1, "bf16"),
        case(f"{STORED}qwen3", "4x256", 3, "bf16", ranks=2, recompute="full"),
        case(f"{STORED}gpt2", "8x256", 2, "bf16", recompute="full", accumulate=2),
    ]


def adapted() -> list[Case]:
    """Adapters on saved weights, over text and over rows with answers."""
    rows = ("mode=sft", "data=stdlib_qa")
    return [
        case(f"{STORED}llama_tiny", "8x256", 0, "fp32", "adapter=lora"),
        case(f"{STORED}llama_tiny", "8x256", 1, "bf16", "adapter=lora", *rows),
        case(f"{STORED}llama_tiny", "8x512", 0, "bf16", "adapter=lora", *rows, recompute="full"),
        case(f"{STORED}llama_tiny", "4x256", 2, "bf16", "adapter=lora", ranks=2),
        case(f"{STORED}llama_tiny", "4x256", 3, "fp32", "adapter=lora", ranks=2),
        case(f"{STORED}llama_tiny", "8x256", 0, "fp32", "adapter=dora", *rows),
        case(f"{STORED}moe_tiny", "8x256", 0, "bf16", "adapter=lora"),
        case(f"{STORED}mamba_tiny", "8x256", 0, "fp32", "adapter=lora"),
        case(f"{STORED}phi", "8x256", 1, "bf16", "adapter=lora", accumulate=2),
        case(f"{STORED}llama_tiny", "8x256", 0, "bf16", *rows),
    ]


def taught() -> list[Case]:
    teacher = ("model@teacher=pretrained", f"teacher.path={STORED}llama_tiny")
    logits = ("mode=distill", "mode.method=logits", "data=stdlib_raft", *teacher)
    return [case(f"{STORED}llama_tiny", "4x512", 0, "fp32", *logits)]


def save_models(names: list[str], folder: Path) -> None:
    """Models with random weights that a case starts from, unless they are there."""
    for name in names:
        if not (folder / name).exists():
            config = composed(["model=llama_tiny"])
            manifest = prepare(config.data, config.cache, progress=False)
            save_model(folder / name, manifest.vocabulary.folder)


def save_model(path: Path, tokenizer: Path) -> None:
    """A preset, or an architecture of STRANGERS, with its tokenizer in a folder."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints when it is imported
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if path.name in STRANGERS:
        config = AutoConfig.for_model(path.name, vocab_size=4096, **STRANGERS[path.name], **tokens)
    else:
        config = composed([f"model={path.name}"]).model.hf_config(**tokens)
    unfinished = path.with_name(f".{path.name}")
    AutoModelForCausalLM.from_config(config).save_pretrained(unfinished)
    shutil.copytree(tokenizer, unfinished, dirs_exist_ok=True)
    unfinished.rename(path)
