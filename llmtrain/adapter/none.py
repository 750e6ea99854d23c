"""No adapter: every parameter is trained."""

from dataclasses import dataclass

from llmtrain.schema import Part


@dataclass
class NoAdapter(Part):
    """The model as it is."""

    kind: str = "none"
