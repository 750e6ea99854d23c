"""Starts nothing: a run is prepared and rehearsed up to where its ranks would begin."""

from dataclasses import dataclass
from typing import ClassVar

from llmtrain.schema import Part


@dataclass
class Dry(Part):
    """Data is tokenised and opened, the first batch built, its forward and backward traced."""

    kind: str = "dry"
    starts_ranks: ClassVar[bool] = False
    queues: ClassVar[bool] = False

    def check(self, device: str, ranks: int, num_nodes: int) -> None:
        """Any machine can rehearse a run of any other."""
