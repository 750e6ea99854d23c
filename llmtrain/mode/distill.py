"""Distillation: a student learns a teacher's answers, its probabilities, or its view of its own."""

# B batch, L length, T learned tokens

import random
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from llmtrain.errors import ConfigError
from llmtrain.kernel.divergence import DistillationSums, Divergence, TargetKind
from llmtrain.mode.base import Learner, Loss, Mode
from llmtrain.mode.sft import SFT
from llmtrain.schema import learned

if TYPE_CHECKING:
    from torch import Tensor

# Sampling from the student as it is, whatever its generation_config prefers.
OWN_DISTRIBUTION = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_beams": 1,
}


class Method(Enum):
    answers = "answers"
    logits = "logits"
    on_policy = "on_policy"


class Targets(Enum):
    """The teacher's probabilities: all of them while it is there, or some of them from disk."""

    online = "online"
    top_k = "top_k"
    sampled = "sampled"


@dataclass
class Distill(Mode):
    """What is learned from the teacher.

    ``answers``: what it wrote, as in mode=sft; ``sections`` are the headings that its answers
    have (null: the prompt's own) and ``drop_oracle_fraction`` is the share of RAFT rows that are
    shown distractors only. ``logits``: ``alpha`` of the divergence from its probabilities at
    ``temperature`` and 1 - alpha of the cross-entropy with the text. ``on_policy``: the same
    divergence, alone, where a ``student_fraction`` of batches have answers of at most
    ``max_new_tokens`` that the student wrote itself (Agarwal et al. 2024, "On-policy distillation
    of language models"). ``jsd_beta`` is the teacher's share of the mixture in the generalised
    Jensen-Shannon divergence.
    """

    kind: str = "distill"
    method: Method = Method.answers
    divergence: Divergence = Divergence.forward_kl
    temperature: float = learned(1.0, above=0)
    alpha: float = learned(0.5, low=0, high=1)
    jsd_beta: float = learned(0.5, above=0, high=0.999)
    targets: Targets = Targets.online
    top_k: int = learned(12, low=1)
    student_fraction: float = learned(1.0, low=0, high=1)
    max_new_tokens: int = learned(128, low=1)
    sections: list[str] | None = None
    drop_oracle_fraction: float = learned(0.0, low=0, high=1)

    @property
    def wants_rows(self) -> bool | None:
        return None if self.method is Method.logits else True

    @property
    def needs_teacher(self) -> bool:
        return self.method is not Method.answers

    @property
    def caches_targets(self) -> bool:
        """Whether the teacher is asked once, before training."""
        return self.targets is not Targets.online

    @property
    def packs(self) -> bool:
        return self.method is not Method.on_policy

    @property
    def target_kind(self) -> TargetKind:
        return TargetKind(self.targets.value)

    def check(self) -> None:
        if self.targets is Targets.online:
            return
        if self.method is not Method.logits:
            reason = f"is for mode.method=logits, not {self.method.value}"
            raise ConfigError("mode.targets", self.targets.value, reason, "take online")
        if self.divergence is not Divergence.forward_kl:
            reason = "needs all of the teacher's probabilities"
            remedy = "take mode.targets=online, or forward_kl"
            raise ConfigError("mode.divergence", self.divergence.value, reason, remedy)

    def rewritten(
        self, learner: Learner, batch: "dict[str, Tensor]", key: int, is_partitioned: bool
    ) -> "dict[str, Tensor]":
        is_own = random.Random(key).random() < self.student_fraction
        if self.method is not Method.on_policy or not is_own:
            return batch
        return written_by(learner, batch, self.max_new_tokens, is_partitioned)

    def loss(self, learner: Learner, batch: dict[str, Any], teacher: Learner | None = None) -> Loss:
        if self.method is Method.answers or not learner.model.training:  # held-out losses compare
            return SFT.loss(self, learner, batch)  # type: ignore[arg-type]
        labels_BL = batch.pop("labels")
        targets = [batch.pop(name) for name in ("teacher_ids", "teacher_probs") if name in batch]
        is_learned_BL = labels_BL >= 0
        read = learner.read(batch)
        student_TD, labels_T = read.features_BLD[is_learned_BL], labels_BL[is_learned_BL]
        if targets:
            from llmtrain.kernel.divergence import sparse_sum

            length = labels_BL.shape[1]  # of padded rows, at most that of their targets
            ids_TK, probs_TK = (values_BLK[:, :length][is_learned_BL] for values_BLK in targets)
            sums = sparse_sum(
                student_TD,
                read.head,
                ids_TK,
                probs_TK,
                labels_T,
                kind=self.target_kind,
                temperature=self.temperature,
                alpha=self.alpha,
            )
        else:
            assert teacher is not None
            sums = self.online(read.head, student_TD, teacher, batch, is_learned_BL, labels_T)
        loss_sum, divergence, cross_entropy = sums
        num_tokens = is_learned_BL.sum()
        extras = {
            "divergence": divergence / num_tokens,
            "cross_entropy": cross_entropy / num_tokens,
        }
        return Loss(loss_sum, num_tokens, read.penalty, {**read.extras, **extras})

    def online(
        self,
        head: Any,
        student_TD: "Tensor",
        teacher: Learner,
        inputs: "dict[str, Tensor]",
        is_learned_BL: "Tensor",
        labels_T: "Tensor",
    ) -> DistillationSums:
        """Loss, divergence and cross-entropy against a teacher that reads the same tokens now."""
        import torch

        from llmtrain.kernel.divergence import distillation_sum

        with torch.no_grad():
            read = teacher.read(inputs)
        return distillation_sum(
            student_TD,
            head,
            read.features_BLD[is_learned_BL],
            read.head,
            labels_T,
            divergence=self.divergence,
            temperature=self.temperature,
            alpha=1.0 if self.method is Method.on_policy else self.alpha,
            beta=self.jsd_beta,
        )


def written_by(
    learner: Learner, batch: "dict[str, Tensor]", max_new_tokens: int, is_partitioned: bool
) -> "dict[str, Tensor]":
    """The prompts of a batch of one document a row, with answers sampled from the learner."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model, device = learner.model, learner.model.device
    eos_id = model.generation_config.eos_token_id
    first_labels = (batch["labels"] >= 0).int().argmax(1).tolist()
    prompts = [ids[: end + 1] for ids, end in zip(batch["input_ids"], first_labels, strict=True)]
    options: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    prompts_BL = pad_sequence(prompts, padding_value=0, **options)
    mask_BL = pad_sequence([torch.ones_like(ids) for ids in prompts], **options)
    was_training = model.training
    model.eval()
    learner.forget_documents()
    with torch.no_grad():
        written_BL = model.generate(
            prompts_BL.to(device),
            attention_mask=mask_BL.to(device),
            max_new_tokens=max_new_tokens,
            **OWN_DISTRIBUTION,
            synced_gpus=is_partitioned,
        ).cpu()
    model.train(was_training)
    answers = [until_end(ids[prompts_BL.shape[1] :], eos_id) for ids in written_BL]
    texts = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    inputs_BL = pad_sequence([text[:-1] for text in texts], batch_first=True)
    labels_BL = pad_sequence([text[1:] for text in texts], batch_first=True, padding_value=-100)
    for labels_L, prompt in zip(labels_BL, prompts, strict=True):
        labels_L[: len(prompt) - 1] = -100
    return {"input_ids": inputs_BL, "labels": labels_BL}


def until_end(ids: "Tensor", eos_id: int | list[int] | None) -> "Tensor":
    """An answer with its end-of-sequence token, and none of the padding behind it."""
    import torch

    ends = torch.isin(ids, torch.tensor([] if eos_id is None else eos_id)).nonzero()
    return ids[: int(ends[0]) + 1] if len(ends) else ids
