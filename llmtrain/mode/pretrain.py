"""Pretraining: every token predicts the next one."""

from dataclasses import dataclass
from typing import Any

from llmtrain.mode.base import Learner, Loss, Mode


@dataclass
class Pretrain(Mode):
    """Cross-entropy of the next token, plus the balance loss of a mixture's router."""

    kind: str = "pretrain"

    @property
    def wants_rows(self) -> bool:
        return False

    def loss(self, learner: Learner, batch: dict[str, Any], teacher: Learner | None = None) -> Loss:
        from llmtrain.kernel.cross_entropy import cross_entropy_of

        labels_BL = batch.pop("labels")
        read = learner.read(batch)
        loss_sum = cross_entropy_of(read.head, read.features_BLD, labels_BL)
        return Loss(loss_sum, (labels_BL >= 0).sum(), read.penalty, read.extras)
