"""What a teacher has to give before training: the student's tokenizer, and targets on disk."""

# B batch, L length, V vocabulary, K targets of a token

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config import RunConfig
from llmtrain.data.corpus import digest
from llmtrain.data.sequences import Sequences, open_sequences
from llmtrain.data.shards import Manifest
from llmtrain.data.teacher_cache import TeacherCache, TeacherHeader, is_whole, targets_of
from llmtrain.data.tokenizer import Vocabulary, ids_of, vocabulary_at
from llmtrain.errors import ConfigError
from llmtrain.mode.base import Learner
from llmtrain.mode.distill import Distill, Targets
from llmtrain.model.causal_lm import Kernels
from llmtrain.model.facts import possible_attention
from llmtrain.plan import Plan
from llmtrain.ranks import die_with_parent

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel


def check_tokenizers(config: RunConfig, vocabulary: Vocabulary) -> None:
    """Raise ConfigError where the teacher's token ids mean other text than the student's."""
    if config.teacher is None or config.teacher.path == config.tokenizer_path:
        return
    of_teacher = vocabulary_at(config.teacher.path, "teacher.path", config.cache)
    if ids_of(of_teacher) != ids_of(vocabulary):
        reason = f"has another tokenizer than the student ({config.model.path})"
        remedy = "take two of one family, or mode.method=answers, which passes text"
        raise ConfigError("teacher.path", config.teacher.path, reason, remedy)


def prepare_targets(config: RunConfig, plan: Plan, manifest: Manifest) -> Path | None:
    """The folder of the teacher's cached probabilities, filled now unless it is there.

    None for a run that reads its teacher while it trains, or has none.
    """
    mode = config.mode
    if not (isinstance(mode, Distill) and mode.caches_targets):
        return None
    check_targets(mode, manifest.vocabulary)
    folder = config.cache / "teachers" / digest([str(header_of(config, plan, manifest))])
    if not is_whole(folder):
        # A process of its own gives all of the device's memory back.
        with ProcessPoolExecutor(1, get_context("spawn"), die_with_parent) as process:
            process.submit(write_targets, folder, config, plan, manifest).result()
    return folder


def write_targets(folder: Path, config: RunConfig, plan: Plan, manifest: Manifest) -> None:
    """Ask the teacher about every sequence."""
    sequences = open_train(plan, manifest)
    asked = targets(config, plan, sequences, manifest)
    TeacherCache.write(folder, header_of(config, plan, manifest), len(sequences), asked)


def check_targets(mode: Distill, vocabulary: Vocabulary) -> None:
    """Raise ConfigError where the likeliest tokens would be all that there are."""
    if mode.targets is Targets.top_k and mode.top_k >= vocabulary.size:
        reason = f"is not below the {vocabulary.size} tokens of the vocabulary"
        raise ConfigError("mode.top_k", mode.top_k, reason, "lower it, or take mode.targets=online")


def header_of(config: RunConfig, plan: Plan, manifest: Manifest) -> TeacherHeader:
    """What the targets of a run depend on."""
    mode: Distill = config.mode
    return TeacherHeader(
        teacher=str(plan.teacher_fingerprint),
        vocabulary=manifest.vocabulary.sha,
        vocab_size=manifest.vocabulary.size,
        manifest=digest([manifest.fingerprint, plan.packing, plan.keep_documents_apart]),
        seq_len=plan.seq_len,
        kind=mode.target_kind,
        k=mode.top_k,
        temperature=mode.temperature,
        precision=plan.precision,
        seed=config.seed if mode.targets is Targets.sampled else None,
    )


def open_train(plan: Plan, manifest: Manifest) -> Sequences:
    """The sequences that the run will train on."""
    apart = plan.keep_documents_apart
    return open_sequences(manifest, "train", plan.seq_len, keep_apart=apart, packing=plan.packing)


def targets(
    config: RunConfig, plan: Plan, sequences: Sequences, manifest: Manifest
) -> "Iterator[tuple[NDArray[Any], NDArray[Any]]]":
    """``ids_LK`` and ``probs_LK`` of every sequence, with a bar on a terminal."""
    import torch
    from rich.progress import track

    mode: Distill = config.mode
    device = torch.device(plan.device)
    learner = Learner(build_teacher(config, plan, device))
    generator = torch.Generator(device).manual_seed(config.seed)
    starts = range(0, len(sequences), plan.micro_batch)
    for start in track(starts, f"asking {config.teacher.name}", transient=True):
        arrays = sequences.batch(range(start, min(start + plan.micro_batch, len(sequences))))
        batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        del batch["labels"]
        with torch.no_grad():
            read = learner.read(batch)
            for features_LD in read.features_BLD:
                logits_LV = read.head(features_LD)[:, : manifest.vocabulary.size]
                found = targets_of(
                    logits_LV, mode.top_k, mode.target_kind, mode.temperature, generator
                )
                yield filled_up(found[0], plan.seq_len), filled_up(found[1], plan.seq_len)


def filled_up(values_LK: "torch.Tensor", seq_len: int) -> "NDArray[Any]":
    """A row's targets on the host, with zeros where a padded batch is shorter than L."""
    import numpy as np

    return np.pad(values_LK.cpu().numpy(), ((0, seq_len - len(values_LK)), (0, 0)))


def build_teacher(config: RunConfig, plan: Plan, device: "torch.device") -> "PreTrainedModel":
    """The teacher, whole and never trained."""
    import torch

    from llmtrain.kernel import mixers, products

    if plan.has_wide_products:
        products.install()
    attention = possible_attention(config.teacher.facts(config.cache), plan.attention)
    teacher = config.teacher.build(getattr(torch, plan.dtype_name), attention)
    is_reference = config.teacher.kernels is Kernels.reference
    kernel = "transformers" if is_reference else "compiled"
    mixers.install(teacher.config.model_type, kernel, config.cache)
    return teacher.to(device).eval().requires_grad_(False)
