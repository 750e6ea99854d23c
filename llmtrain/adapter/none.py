"""No adapter: every parameter is trained."""

from dataclasses import dataclass

from llmtrain.adapter.base import Adapter


@dataclass
class NoAdapter(Adapter):
    """The model as it is."""

    kind: str = "none"
