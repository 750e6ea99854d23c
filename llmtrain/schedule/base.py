"""What every schedule shares: a linear warm-up, and then its own shape."""

from dataclasses import dataclass

from llmtrain.schema import Part, learned


@dataclass
class Schedule(Part):
    """``warmup_steps``, or a share of the run, ``warmup_fraction``; both null: 5 % of the steps."""

    warmup_steps: int | None = learned(None, low=0)
    warmup_fraction: float | None = learned(None, low=0, high=1)

    def factor(self, step: int, num_steps: int, warmup_steps: int) -> float:
        """What the learning rate is multiplied with at a step (from 0), between 0 and 1."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return self.shape((step - warmup_steps) / max(1, num_steps - warmup_steps))

    def shape(self, progress: float) -> float:
        """The factor after the warm-up; ``progress`` runs from 0 to 1."""
        raise NotImplementedError
