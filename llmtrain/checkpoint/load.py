"""Fills an engine from a checkpoint, whatever ranks and ZeRO stage it was taken on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.checkpoint.pieces import (
    MASTER,
    MOMENTUM,
    Piece,
    by_flat,
    elementwise,
    in_memory,
    inner_state,
    pieces,
    scaler,
    whole_matrices,
)
from llmtrain.errors import TrainingError
from llmtrain.ranks import Ranks

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from torch import Tensor


def read_state(path: Path) -> dict[str, Any]:
    """The JSON of a published checkpoint."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def load(path: Path, engine: "DeepSpeedEngine", ranks: Ranks) -> dict[str, Any]:
    """Fill the engine from a checkpoint of any number of ranks and any stage; returns its JSON."""
    import torch

    saved = read_state(path)
    fragments = Fragments(path, ranks.rank)
    with torch.no_grad():
        for number, (flat, owned) in enumerate(by_flat(pieces(engine))):
            with in_memory(engine, flat, is_changed=True):
                restore_flat(engine, owned, number, saved, fragments)
        refresh_weights(engine)
    scale = scaler(engine)
    for name, value in saved["scaler"].items():
        if value is not None and scale is not None:  # in fp32 some stages have none
            setattr(scale, name, value)
    restore_random_state(path / f"rng_{ranks.rank}.safetensors")
    return saved


def restore_flat(
    engine: "DeepSpeedEngine",
    owned: list[Piece],
    number: int,
    saved: dict[str, Any],
    fragments: "Fragments",
) -> None:
    """Fill the pieces in the optimizer's tensor ``number``, and its state."""
    flat = owned[0].flat
    state, names = inner_state(engine, flat), {piece.name for piece in owned}
    restore_flat_state(state, flat, number, names, saved, fragments)
    alike = {MASTER: flat, **elementwise(state, flat)}
    whole = whole_matrices(engine, flat)
    if MOMENTUM in fragments.states_of({piece.name for piece in whole}):
        alike.pop(MOMENTUM, None)
        state[MOMENTUM] = fragments.joined(MOMENTUM, whole).to(flat.device)
    for piece in owned:
        for name, values in alike.items():
            fragments.fill(name, piece, piece.view(values))


def restore_flat_state(
    state: dict[str, Any],
    flat: "Tensor",
    number: int,
    names: set[str],
    saved: dict[str, Any],
    fragments: "Fragments",
) -> None:
    """Make the optimizer's state of one tensor exist: an optimizer fills it at its first step.

    ``names`` are the parameters whose values lie in ``flat``, the optimizer's tensor ``number``.
    """
    import torch

    for name in fragments.states_of(names) - {MASTER, *state}:
        # Stages 1 and 2 make Muon's momentum in the gradient's dtype, the others in the master's.
        dtype = flat.dtype if name == MOMENTUM else fragments.dtype(name, names)
        state[name] = torch.zeros_like(flat, dtype=dtype)
    for name in fragments.states_of({f"#{number}"}):
        state[name] = fragments.block(name, number).to(flat.device)
    for name, scalar in scalars_of(saved["scalars"], number, names).items():
        value = scalar["value"]
        state[name] = torch.tensor(value, device=flat.device) if scalar["is_tensor"] else value


def scalars_of(kept: list[dict[str, Any]], number: int, names: set[str]) -> dict[str, Any]:
    """The single numbers of the tensor in which these parameters lie."""
    if "names" not in kept[0]:  # as versions before kept them: by the number of the tensor
        return kept[min(number, len(kept) - 1)]
    found = (each["values"] for each in kept if not names.isdisjoint(each["names"]))
    values: dict[str, Any] = next(found, {})
    return values


class Fragments:
    """The pieces in all files of a checkpoint, found by state, parameter and offset."""

    def __init__(self, path: Path, rank: int) -> None:
        from safetensors import safe_open

        self.path = path
        self.own: Any = None
        self.places: dict[tuple[str, str], dict[int, tuple[int, int, Any, str]]] = {}
        files = sorted(path.glob("rank_*.safetensors"))
        for file in files:
            reader = safe_open(file, framework="pt")
            if file.stem == f"rank_{rank}" or len(files) == 1:  # at stage 0 all own the same
                self.own = reader
            for key in reader.keys():  # noqa: SIM118  (not a dict)
                state, name, start = key.split("|")
                numel = reader.get_slice(key).get_shape()[0]
                place = (int(start), numel, reader, key)
                places = self.places.setdefault((state, name), {})
                if int(start) not in places or reader is self.own:  # two ranks may hold the same
                    places[int(start)] = place

    def states_of(self, names: set[str]) -> set[str]:
        """The states that are kept of these parameters, or of a whole tensor (``#<number>``)."""
        return {state for state, name in self.places if name in names}

    def block(self, state: str, number: int) -> "Tensor":
        """A state that is kept whole: this rank's own, for it fits no other."""
        key = f"{state}|#{number}|0"
        if self.own is None or key not in self.own.keys():  # noqa: SIM118
            raise TrainingError(f"{self.path} has no {state} for this rank: use as many as before.")
        return self.own.get_tensor(key)  # type: ignore[no-any-return]

    def dtype(self, state: str, names: set[str]) -> "torch.dtype":
        """The dtype in which a state of one of these parameters is kept."""
        places = next(self.places[state, name] for name in names if (state, name) in self.places)
        _, _, reader, key = next(iter(places.values()))
        return reader.get_slice(key)[:0].dtype  # type: ignore[no-any-return]

    def joined(self, state: str, whole: list[Piece]) -> "Tensor":
        """A state of whole parameters, one behind the other."""
        import torch

        dtype = self.dtype(state, {piece.name for piece in whole})
        values = torch.zeros(sum(piece.numel for piece in whole), dtype=dtype)
        for piece in whole:
            self.fill(state, piece, piece.view(values))
        return values

    def fill(self, state: str, piece: Piece, target: "Tensor") -> None:
        """Copy into ``target`` whatever overlaps ``piece``. Raises TrainingError for a gap."""
        missing = piece.numel
        stop = piece.start + piece.numel
        for start, numel, reader, key in self.places.get((state, piece.name), {}).values():
            low, high = max(start, piece.start), min(start + numel, stop)
            if low < high:
                values = reader.get_slice(key)[low - start : high - start]
                target.narrow(0, low - piece.start, high - low).copy_(values)
                missing -= high - low
        if missing:
            raise TrainingError(f"{self.path} lacks {missing} values of {state} of {piece.name}.")


def refresh_weights(engine: "DeepSpeedEngine") -> None:
    """Copy the masters into the weights that the model multiplies with."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        refresh_partitions(engine)
    elif hasattr(optimizer, "fp16_groups"):
        for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for param, master in zip(params, masters, strict=True):
                param.data.copy_(master.data)


def refresh_partitions(engine: "DeepSpeedEngine") -> None:
    """The same at stage 3, where small weights stay whole between steps: gather them anew."""
    optimizer = engine.optimizer
    optimizer._partition_all_parameters()
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        with in_memory(engine, flat):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
    kept_whole = optimizer.persistent_parameters
    if kept_whole:
        kept_whole[0].all_gather(kept_whole)


def restore_random_state(path: Path) -> None:
    """This rank's random state, where the checkpoint has one for it."""
    import torch
    from safetensors.torch import load_file

    if not path.exists():
        return
    state = load_file(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
