"""Resumable state as fragments by name, so that ranks and ZeRO stage may change.

    checkpoints/step_<n>/
      state.json               step, loss scale, optimizer scalars, world size, and the run's own
      rank_<r>.safetensors     "<state>|<parameter>|<offset>": flat pieces that rank r owned
      rng_<r>.safetensors      random state of rank r
      manifest.json            bytes and SHA-256 of each file, and what wrote them

Only data is read back: safetensors and JSON, nothing is unpickled. A checkpoint is there wholly or
not at all, and what has changed since it was written is found out before it is loaded.
"""

from llmtrain.checkpoint.load import Fragments, load, read_state
from llmtrain.checkpoint.pieces import MASTER, Piece, pieces, scaler
from llmtrain.checkpoint.saver import Retention, Saver
from llmtrain.checkpoint.snapshot import take

__all__ = [
    "MASTER",
    "Fragments",
    "Piece",
    "Retention",
    "Saver",
    "load",
    "pieces",
    "read_state",
    "scaler",
    "take",
]
