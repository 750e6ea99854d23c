"""No decay."""

from dataclasses import dataclass

from llmtrain.schedule.base import Schedule


@dataclass
class Constant(Schedule):
    """The full learning rate from the end of the warm-up on."""

    kind: str = "constant"

    def shape(self, progress: float) -> float:
        return 1.0
