"""Supervised fine-tuning: the tokens of an answer are predicted, those of its prompt are read."""

from dataclasses import dataclass
from typing import Any

from llmtrain.mode.base import Learner, Loss, Mode


@dataclass
class SFT(Mode):
    """Cross-entropy of the learned tokens; the vocabulary's logits exist for these alone."""

    kind: str = "sft"

    @property
    def wants_rows(self) -> bool:
        return True

    def loss(self, learner: Learner, batch: dict[str, Any], teacher: Learner | None = None) -> Loss:
        from llmtrain.kernel.cross_entropy import cross_entropy_of

        labels_BL = batch.pop("labels")
        read = learner.read(batch)
        is_learned_BL = labels_BL >= 0
        features_TD, labels_T = read.features_BLD[is_learned_BL], labels_BL[is_learned_BL]
        loss_sum = cross_entropy_of(read.head, features_TD, labels_T)
        return Loss(loss_sum, is_learned_BL.sum(), read.penalty, read.extras)
