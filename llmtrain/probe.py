"""Whether packed documents stay apart, tried on the model that is about to be trained."""

from typing import TYPE_CHECKING

from llmtrain.errors import TrainingError
from llmtrain.mode.base import Learner

if TYPE_CHECKING:
    from torch import Tensor

HALF = 8  # tokens of each of the two documents
MOST = 0.1  # of what the first document moves the second by when they are one


def check_apart(learner: Learner | None) -> None:
    """Raise TrainingError where a document's tokens change what is read in the one after it.

    Some architectures do not look at position ids, and mix packed documents in silence.
    """
    if learner is None:
        return
    was_training = learner.model.training
    learner.model.eval()
    apart, joined = (influence(learner, is_packed) for is_packed in (True, False))
    learner.model.train(was_training)
    if apart > MOST * joined:
        kind = learner.model.config.model_type
        raise TrainingError(
            f"Packed documents of a {kind} model see each other: set data.packing=false "
            "(data.keep_documents_apart=false for a stream of text)."
        )


def influence(learner: Learner, is_packed: bool) -> float:
    """By how much changing the first half of a sequence moves the features of the second."""
    import torch

    device = learner.model.device
    positions_L = torch.arange(HALF, device=device).repeat(2)
    if not is_packed:
        positions_L[HALF:] += HALF
    ids_L = torch.arange(2 * HALF, device=device)
    changed_L = ids_L.clone()
    changed_L[:HALF] += 1
    with torch.no_grad():
        before, after = (
            learner.read(
                {"input_ids": two(tokens_L), "position_ids": two(positions_L)}
            ).features_BLD
            for tokens_L in (ids_L, changed_L)
        )
    return float((before - after)[:, HALF:].float().abs().max())


def two(values_L: "Tensor") -> "Tensor":
    """A batch of two rows: some attention keeps documents apart in batches of one only."""
    return values_L[None].repeat(2, 1)
