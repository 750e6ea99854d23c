"""Whether packed documents stay apart, tried on the model that is about to be trained."""

from llmtrain.errors import TrainingError
from llmtrain.mode.base import Learner

HALF = 8  # tokens of each of the two documents
MOST = 0.1  # of what the first document moves the second by when they are one


def check_apart(learner: Learner) -> None:
    """Raise TrainingError where a document's tokens change what is read in the one after it.

    Some architectures do not look at position ids, and mix packed documents in silence.
    """
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
            learner.read({"input_ids": ids[None], "position_ids": positions_L[None]}).features_BLD
            for ids in (ids_L, changed_L)
        )
    return float((before - after)[0, HALF:].float().abs().max())
