"""What a checkpoint holds, copied out of an engine: the only part that training waits for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtrain.checkpoint.pieces import (
    MASTER,
    MOMENTUM,
    SCALER_FIELDS,
    Piece,
    block_states,
    by_flat,
    elementwise,
    in_memory,
    inner_state,
    named_scalars,
    pieces,
    scaler,
    swapped_index,
    whole_matrices,
)
from llmtrain.ranks import Ranks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of the state after ``step`` steps, on the host.

    ``tensors`` are empty where another rank owns the same; ``state`` is what goes into JSON.
    """

    step: int
    tensors: dict[str, "Tensor"]
    random: dict[str, "Tensor"]
    state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def take(
    engine: "DeepSpeedEngine", ranks: Ranks, step: int, extra: dict[str, Any], copy: bool
) -> Snapshot:
    """What this rank has to write. Without ``copy`` it must be written before the next step."""
    owns = ranks.is_first or engine.zero_optimization_stage() > 0  # at stage 0 all own everything
    tensors = owned_tensors(engine, copy) if owns else {}
    return Snapshot(step, tensors, random_state(), whole_state(engine, ranks, step, extra))


def owned_tensors(engine: "DeepSpeedEngine", copy: bool) -> dict[str, "Tensor"]:
    """On the host all that this rank owns, by ``<state>|<parameter>|<offset>``.

    What lies there already is copied only if asked: a second copy might not fit.

    States that are not elementwise (blocks of 8-bit values) are kept whole, by the number of their
    tensor: they fit the same ranks and stage only.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    for number, (flat, owned) in enumerate(by_flat(pieces(engine))):
        with in_memory(engine, flat):
            state = {MASTER: flat, **inner_state(engine, flat)}
            is_lent = swapped_index(engine, flat) is not None  # goes back to its disk
            copies = copy or is_lent
            whole = whole_matrices(engine, flat)
            if whole and MOMENTUM in state:
                tensors |= named(MOMENTUM, whole, state.pop(MOMENTUM), copies)
            tensors |= on_host(number, owned, state, copies)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return tensors


def on_host(
    number: int, owned: list[Piece], state: dict[str, Any], copy: bool
) -> dict[str, "Tensor"]:
    """On the host the pieces in the optimizer's tensor ``number``, and its state."""
    flat: Tensor = owned[0].flat
    tensors: dict[str, Tensor] = {}
    for name, values in elementwise(state, flat).items():
        tensors |= named(name, owned, values, copy)
    for name, value in block_states(state, flat).items():
        tensors[f"{name}|#{number}|0"] = host_copy(value, copy)
    return tensors


def named(state: str, found: list[Piece], values: "Tensor", copy: bool) -> dict[str, "Tensor"]:
    """On the host the pieces of one state."""
    return {
        f"{state}|{piece.name}|{piece.start}": host_copy(piece.view(values), copy)
        for piece in found
    }


def host_copy(values: "Tensor", copy: bool) -> "Tensor":
    """Values on the host; from a GPU on their way into pinned memory, at the link's full speed."""
    import torch

    values = values.detach()
    if values.device.type == "cpu":
        return values.clone() if copy else values
    target = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return target.copy_(values, non_blocking=True)


def random_state() -> dict[str, "Tensor"]:
    """The random state of this rank's CPU and, where it has one, of its GPU."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def whole_state(
    engine: "DeepSpeedEngine", ranks: Ranks, step: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """The JSON beside the tensors."""
    return {
        "step": step,
        "world_size": ranks.world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "scaler": {name: getattr(scaler(engine), name, None) for name in SCALER_FIELDS},
        "scalars": named_scalars(engine),
        **extra,
    }
