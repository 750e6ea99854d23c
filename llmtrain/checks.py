"""What can be refused before anything starts, each in one line."""

from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine
from llmtrain.model.causal_lm import Facts
from llmtrain.optimizer.base import require_compiler
from llmtrain.schema import check_bounds

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest


def check(config: RunConfig) -> None:
    """Raise ConfigError for what can be seen to be wrong without importing torch."""
    check_bounds(config)
    check_folder("cache_root", config.cache)
    asked = [
        name for name in ("max_steps", "max_tokens", "max_epochs") if getattr(config.train, name)
    ]
    if len(asked) > 1:
        key, other = (f"train.{name}" for name in asked[:2])
        value = getattr(config.train, asked[0])
        raise ConfigError(key, value, f"and {other} are both given", "give one of them")
    check_name(config)
    check_recomputation(config)
    config.model.check()
    config.data.check()


def check_folder(key: str, path: Path) -> None:
    """Raise ConfigError where a folder can neither be found nor be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(key, path, f"cannot be made: {error.strerror}", "give another") from None


def check_name(config: RunConfig) -> None:
    """A name becomes a folder's."""
    if not config.name or "/" in config.name or config.name.startswith("."):
        raise ConfigError(
            "name", config.name, "cannot name a folder", "leave out / and a leading dot"
        )
    if config.resume not in ("auto", "never"):
        reason = "is not one of the ways to start"
        raise ConfigError("resume", config.resume, reason, "give auto or never")


def check_recomputation(config: RunConfig) -> None:
    value = config.train.activation_checkpointing
    if (
        value is not None
        and value not in ("none", "full")
        and not (value.isdigit() and int(value) > 0)
    ):
        remedy = "give none, full, or k to recompute every k-th layer"
        raise ConfigError("train.activation_checkpointing", value, "is not understood", remedy)


def check_vocabulary(facts: Facts, manifest: "Manifest | None") -> None:
    if manifest is not None and manifest.vocabulary.size > facts.vocab_size:
        size = manifest.vocabulary.size
        reason = f"is smaller than the tokenizer's {size} entries"
        remedy = f"set it to {-(-size // 64) * 64} or take a smaller tokenizer"
        raise ConfigError("model.config.vocab_size", facts.vocab_size, reason, remedy)


def check_stage(config: RunConfig, machine: Machine) -> None:
    """What the optimizer and the device allow of what was asked of ZeRO."""
    config.optimizer.check(machine.device, config.train.grad_clip)
    stage, optimizer = config.zero.stage, config.optimizer
    if stage is not None and stage not in optimizer.stages:
        remedy = f"it works at stages {', '.join(map(str, optimizer.stages))}"
        raise ConfigError(
            "zero.stage", stage, f"does not work with optimizer={optimizer.kind}", remedy
        )
    for name in ("offload_optimizer", "offload_params"):
        asked = getattr(config.zero, name)
        if asked is None or asked.value == "none":
            continue
        if not optimizer.offloads:
            reason = f"is not possible with optimizer={optimizer.kind}"
            raise ConfigError(f"zero.{name}", asked.value, reason, "take optimizer=adamw")
        if asked.value == "nvme":
            raise ConfigError(f"zero.{name}", "nvme", "cannot be resumed from yet", "take cpu")
        needed = 3 if name == "offload_params" else 1
        if stage is not None and stage < needed:
            raise ConfigError(
                "zero.stage", stage, f"cannot offload so ({name})", f"take {needed} or more"
            )


def check_model(config: RunConfig, facts: Facts, manifest: "Manifest | None") -> None:
    """What the model's size allows of lengths, documents and the tokenizer."""
    check_length(config, facts)
    if manifest is not None:
        check_enough(config, manifest)
    check_documents(config, facts)
    check_vocabulary(facts, manifest)


def check_length(config: RunConfig, facts: Facts) -> None:
    if (
        facts.num_attention_layers
        and facts.max_seq_len
        and config.train.seq_len > facts.max_seq_len
    ):
        reason = f"is longer than the model's {facts.max_seq_len} positions"
        remedy = "shorten it or raise model.config.max_position_embeddings"
        raise ConfigError("train.seq_len", config.train.seq_len, reason, remedy)


def check_enough(config: RunConfig, manifest: "Manifest") -> None:
    """Raise ConfigError for a corpus that is shorter than one sequence."""
    from llmtrain.data.sequences import count_sequences, too_short

    num_tokens, seq_len = manifest.train.num_tokens, config.train.seq_len
    if count_sequences(num_tokens, seq_len) == 0:
        raise too_short("train", num_tokens, seq_len)


def check_documents(config: RunConfig, facts: Facts) -> None:
    """Only attention can be kept within a document; a state-space layer's state runs on."""
    if config.data.keep_documents_apart and facts.num_attention_layers < facts.num_layers:
        reason = f"is not possible: {facts.model_type} keeps a state that runs on across documents"
        raise ConfigError("data.keep_documents_apart", "true", reason, "set it to false")


def check_compiler(config: RunConfig, offload_optimizer: str) -> None:
    """What a run compiles at its start needs a compiler on this machine."""
    if config.train.compile:
        require_compiler("train.compile", "true", "leave it out")
    if offload_optimizer != "none":
        remedy = "take optimizer=adamw8bit, a smaller model or more devices"
        require_compiler("zero.offload_optimizer", offload_optimizer, remedy)
