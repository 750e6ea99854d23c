"""What a teacher has to give before training: the student's tokenizer, and targets on disk."""

# B batch, L length, V vocabulary, K targets of a token

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config import RunConfig
from llmtrain.data.corpus import digest
from llmtrain.data.sequences import Sequences, open_sequences
from llmtrain.data.shards import Manifest
from llmtrain.data.teacher_cache import TeacherCache, TeacherHeader, targets_of
from llmtrain.data.tokenizer import Vocabulary, ids_of, vocabulary_at
from llmtrain.errors import ConfigError
from llmtrain.mode.base import Learner
from llmtrain.mode.distill import Distill
from llmtrain.plan import Plan

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
    header = header_of(config, plan, manifest)
    folder = config.cache / "teachers" / digest([str(header)])
    sequences = open_train(plan, manifest)
    TeacherCache.write(folder, header, len(sequences), targets(config, plan, sequences, manifest))
    return folder


def header_of(config: RunConfig, plan: Plan, manifest: Manifest) -> TeacherHeader:
    """What the targets of a run depend on."""
    mode: Distill = config.mode
    return TeacherHeader(
        teacher=str(plan.teacher_fingerprint),
        vocabulary=manifest.vocabulary.sha,
        vocab_size=manifest.vocabulary.size,
        manifest=manifest.fingerprint,
        seq_len=plan.seq_len,
        kind=mode.target_kind,
        k=mode.top_k,
        temperature=mode.temperature,
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
    learner = Learner(config.teacher.build(dtype_of(plan), "sdpa").to(device).eval())
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
                yield found[0].cpu().numpy(), found[1].cpu().numpy()


def dtype_of(plan: Plan) -> Any:
    import torch

    names = {"fp32": torch.float32, "fp16": torch.float16}
    return names.get(plan.precision, torch.bfloat16)
