"""What can be refused before anything starts, each in one line."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine
from llmtrain.kernel.packed import keeps_apart
from llmtrain.model.facts import Facts
from llmtrain.offloading import require_libaio
from llmtrain.on_finish import Shutdown
from llmtrain.optimizer.base import require_compiler, require_toolkit
from llmtrain.schema import check_bounds

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest


def check(config: RunConfig) -> None:
    """Raise ConfigError for what can be seen to be wrong without importing torch."""
    check_bounds(config)
    check_folder("cache_root", config.cache)
    if config.checkpoint.mirror is not None:
        check_folder("checkpoint.mirror", Path(config.checkpoint.mirror).expanduser())
    asked = [
        name for name in ("max_steps", "max_tokens", "max_epochs") if getattr(config.train, name)
    ]
    if len(asked) > 1:
        key, other = (f"train.{name}" for name in asked[:2])
        value = getattr(config.train, asked[0])
        raise ConfigError(key, value, f"and {other} are both given", "give one of them")
    check_name(config)
    check_start(config.resume)
    check_recomputation(config)
    config.model.check()
    config.data.check()
    config.adapter.check()
    config.mode.check()
    config.sweep.check()
    check_mode(config)


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


def check_start(resume: str) -> None:
    """``auto``, ``never``, a step, or a path that is there."""
    is_known = resume in ("auto", "never") or resume.isdecimal()
    if not is_known and not Path(resume).expanduser().exists():
        reason = "is not one of the ways to start"
        remedy = "give auto, never, a step of this run, a run folder or a checkpoint"
        raise ConfigError("resume", resume, reason, remedy)


def check_mode(config: RunConfig) -> None:
    """Mode, data and teacher have to go together."""
    mode, data = config.mode, config.data
    if mode.wants_rows is not None and mode.wants_rows is not data.has_masks:
        has, wants = ("rows", "text") if data.has_masks else ("text", "rows with answers")
        remedy = "take data=stdlib or text" if data.has_masks else "take data=chat or stdlib_qa"
        remedy += ", or mode=sft" if data.has_masks else ", or mode=pretrain"
        raise ConfigError(
            "data", data.name, f"has {has} and mode={mode.kind} learns {wants}", remedy
        )
    if mode.needs_teacher and config.teacher is None:
        remedy = "give one: model@teacher=pretrained teacher.path=<folder or hub name>"
        raise ConfigError("teacher", None, f"is needed for mode.method={mode.method.value}", remedy)
    if config.teacher is not None and not mode.needs_teacher:
        reason = f"has no effect with mode={mode.kind}"
        remedy = "leave it out, or take mode=distill mode.method=logits"
        raise ConfigError("teacher", config.teacher.name, reason, remedy)
    if config.teacher is not None:
        config.teacher.check("teacher")
        if config.teacher.path is None:
            reason = "has fresh weights, which teach nothing"
            remedy = "take model@teacher=pretrained teacher.path=<folder or hub name>"
            raise ConfigError("teacher", config.teacher.name, reason, remedy)


def check_recomputation(config: RunConfig) -> None:
    value = config.train.activation_checkpointing
    if (
        value is not None
        and value not in ("none", "full")
        and not (value.isdecimal() and int(value) > 0)
    ):
        remedy = "give none, full, or k to recompute every k-th layer"
        raise ConfigError("train.activation_checkpointing", value, "is not understood", remedy)


def check_vocabulary(config: RunConfig, facts: Facts, manifest: "Manifest | None") -> None:
    """A token beyond the embedding has no row; that of stored weights is as large as it is."""
    if manifest is not None:
        require_rows(config, facts, manifest.vocabulary.size)


def check_given_tokenizer(config: RunConfig) -> None:
    """Refuse one that exists and is too large before hours of text are read for it."""
    from llmtrain.data.tokenizer import vocabulary_at

    key, path = "model.path", config.tokenizer_path
    if path is None:
        key, path = "data.tokenizer.path", config.data.tokenizer.path
    if path is not None:
        size = vocabulary_at(path, key, config.cache).size
        require_rows(config, config.model.facts(config.cache), size)


def require_rows(config: RunConfig, facts: Facts, size: int) -> None:
    """Raise ConfigError where the embedding has fewer rows than a tokenizer has entries."""
    if size > facts.vocab_size:
        reason = f"is smaller than the tokenizer's {size} entries"
        remedy = f"set it to {-(-size // 64) * 64} or take a smaller tokenizer"
        if config.model.path is not None:
            remedy = "give the weights' own tokenizer: one more token would need one more row"
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
        needed = 3 if name == "offload_params" or asked.value == "nvme" else 1
        if stage is not None and stage < needed:
            raise ConfigError(
                "zero.stage", stage, f"cannot offload so ({name})", f"take {needed} or more"
            )


def check_model(config: RunConfig, facts: Facts, manifest: "Manifest | None") -> None:
    """What the model allows of adapters, lengths, documents and the tokenizer."""
    config.adapter.check_layers(facts)
    check_length(config, facts, "the model's")
    check_answer_length(config, facts)
    if manifest is not None:
        check_enough(config, manifest)
    check_documents(config, facts)
    check_vocabulary(config, facts, manifest)


def check_teacher(config: RunConfig, facts: Facts) -> None:
    """A teacher reads the sequences that the student reads."""
    check_length(config, facts, "the teacher's")
    check_documents(config, facts)


def check_length(config: RunConfig, facts: Facts, whose: str) -> None:
    if (
        facts.num_attention_layers
        and facts.max_seq_len
        and config.train.seq_len > facts.max_seq_len
    ):
        reason = f"is longer than {whose} {facts.max_seq_len} positions"
        remedy = f"set train.seq_len={facts.max_seq_len}"
        if config.model.path is None:
            remedy += " or raise model.config.max_position_embeddings"
        raise ConfigError("train.seq_len", config.train.seq_len, reason, remedy)


def check_answer_length(config: RunConfig, facts: Facts) -> None:
    """Answers that the student writes come behind a prompt of up to a whole sequence."""
    mode = config.mode
    if mode.packs or not facts.max_seq_len:
        return
    if config.train.seq_len + mode.max_new_tokens > facts.max_seq_len:
        reason = f"behind prompts of {config.train.seq_len} tokens passes the model's "
        remedy = f"set train.seq_len to at most {facts.max_seq_len - mode.max_new_tokens}"
        reason += f"{facts.max_seq_len} positions"
        raise ConfigError("mode.max_new_tokens", mode.max_new_tokens, reason, remedy)


def check_enough(config: RunConfig, manifest: "Manifest") -> None:
    """Raise ConfigError for a corpus that is shorter than one sequence."""
    from llmtrain.data.sequences import count_sequences, too_short

    num_tokens, seq_len = manifest.train.num_tokens, config.train.seq_len
    if not manifest.has_masks and count_sequences(num_tokens, seq_len) == 0:
        raise too_short("train", num_tokens, seq_len)


def check_documents(config: RunConfig, facts: Facts) -> None:
    """Refuse to keep documents apart where a layer's state would run on from one to the next."""
    has_states = facts.num_attention_layers < facts.num_layers
    if config.data.keeps_apart and has_states and not keeps_apart(facts.model_type):
        reason = f"is not possible: {facts.model_type} keeps a state that runs on across documents"
        key = "data.packing" if config.data.has_masks else "data.keep_documents_apart"
        raise ConfigError(key, "true", reason, f"set {key}=false")


def check_here(config: RunConfig, device: str, offload_optimizer: str, offload_params: str) -> None:
    """Raise ConfigError for what this machine lacks to train a run that can be planned anywhere."""
    config.adapter.check_here(config.model.path)
    config.optimizer.check_here()
    check_after_the_end(config)
    check_compiler(config, offload_optimizer, offload_params)
    if device == "cuda" and not config.launcher.queues:  # a job may load one as its module
        check_toolkit(config, offload_optimizer, offload_params)


def check_after_the_end(config: RunConfig) -> None:
    """A machine of a cluster is not the user's to turn off."""
    shutdown = config.on_finish.shutdown
    if config.launcher.queues and shutdown is not Shutdown.never:
        remedy = "leave it out; on_finish.command is run when the job has ended"
        raise ConfigError("on_finish.shutdown", shutdown.value, "is for your own machine", remedy)
    config.on_finish.check()


def check_compiler(config: RunConfig, offload_optimizer: str, offload_params: str = "none") -> None:
    """What a run compiles at its start needs a compiler on this machine."""
    if config.train.compile:
        require_compiler("train.compile", "true", "leave it out")
    if offload_optimizer != "none":
        remedy = "take optimizer=adamw8bit, a smaller model or more devices"
        require_compiler("zero.offload_optimizer", offload_optimizer, remedy)
    for name, place in (("optimizer", offload_optimizer), ("params", offload_params)):
        if place == "nvme":
            require_libaio(f"zero.offload_{name}")


def check_toolkit(config: RunConfig, offload_optimizer: str, offload_params: str) -> None:
    """What DeepSpeed compiles for a GPU at the start needs nvcc on this machine."""
    if config.optimizer.compiles_for_gpu and offload_optimizer == "none":
        require_toolkit("optimizer", config.optimizer.kind, "take optimizer=adamw")
    for name, place in (("optimizer", offload_optimizer), ("params", offload_params)):
        if place == "nvme":
            require_toolkit(f"zero.offload_{name}", place, "take cpu")


def check_interval(
    every: int, num_steps: int, step_seconds: float, limit_seconds: float | None
) -> None:
    """Raise ConfigError for a run whose job ends before the first checkpoint is written.

    ``limit_seconds`` is what the job has left (:func:`seconds_left`), None without a limit.
    """
    if limit_seconds is None or min(every, num_steps) * step_seconds < limit_seconds:
        return
    hours, limit_hours = every * step_seconds / 3600, limit_seconds / 3600
    most = int(limit_seconds / step_seconds / 2)
    reason = f"takes {hours:.2g} h, and this job ends in {limit_hours:.2g} h: nothing would be kept"
    remedy = f"set it to at most {most}" if most else "ask for a longer job"
    raise ConfigError("checkpoint.every", every, reason, remedy)


def seconds_left() -> float | None:
    """Until the Slurm job around this process ends; None outside one."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - time.time() if end.isdigit() else None
