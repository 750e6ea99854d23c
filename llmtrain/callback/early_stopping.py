"""Early stopping (Prechelt 1998, "Early Stopping - But When?")."""

import math
from dataclasses import dataclass

from llmtrain.callback.base import Callback, Record
from llmtrain.schema import learned


@dataclass
class EarlyStopping(Callback):
    """Ends a run whose held-out loss does not fall any more.

    It has to fall by more than ``min_delta`` below the best, in ``patience`` evaluations.
    """

    kind: str = "early_stopping"
    patience: int = learned("???", low=1)
    min_delta: float = learned("???", low=0)

    def __post_init__(self) -> None:
        self.best_loss, self.num_waited = math.inf, 0

    def on_eval(self, record: Record) -> str | None:
        if record["eval_loss"] < self.best_loss - self.min_delta:
            self.best_loss, self.num_waited = record["eval_loss"], 0
            return None
        self.num_waited += 1
        if self.num_waited < self.patience:
            return None
        return f"the held-out loss stayed at {self.best_loss:.4f} for {self.patience} evaluations"
