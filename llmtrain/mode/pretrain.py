"""Pretraining: every token predicts the next one."""

# B batch, L length, V vocabulary

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtrain.mode.base import Loss, Mode

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Pretrain(Mode):
    """Cross-entropy of the next token, plus the balance loss of a mixture's router."""

    kind: str = "pretrain"

    def loss(self, model: "nn.Module", batch: dict[str, Any]) -> Loss:
        from llmtrain.kernel.cross_entropy import cross_entropy_sum

        labels_BL = batch.pop("labels")
        output = model(**batch, use_cache=False)
        loss_sum = cross_entropy_sum(output.logits, labels_BL)
        balance = getattr(output, "aux_loss", None)
        num_tokens = (labels_BL >= 0).sum()
        if balance is None:
            return Loss(loss_sum, num_tokens, 0.0, {})
        coefficient = model.config.router_aux_loss_coef  # type: ignore[union-attr]
        return Loss(loss_sum, num_tokens, coefficient * balance, {"router_balance_loss": balance})
