"""Resumable state as fragments by name, so that ranks and ZeRO stage may change.

    checkpoints/step_<n>/
      state.json               step, loss scale, optimizer scalars, data fingerprint, world size
      rank_<r>.safetensors     "<state>|<parameter>|<offset>": flat pieces that rank r owned
      rng_<r>.safetensors      random state of rank r

Only data is read back: safetensors and JSON, nothing is unpickled.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import TrainingError
from llmtrain.folder import RunFolder, publish, write_json
from llmtrain.ranks import Ranks

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

MASTER = "master"
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's values that this rank owns.

    ``start`` counts in the flattened parameter, ``flat_start`` in ``flat``, which is the tensor
    that the optimizer updates and keys its state by.
    """

    name: str
    start: int
    numel: int
    flat: "Tensor"
    flat_start: int

    def view(self, values: "Tensor") -> "Tensor":
        """This piece's part of a tensor that is laid out like ``flat``."""
        return values.view(-1).narrow(0, self.flat_start, self.numel)


def pieces(engine: "DeepSpeedEngine") -> list[Piece]:
    """What this rank owns, whatever the ZeRO stage."""
    names = {id(param): name for name, param in engine.module.model.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(whole_pieces(engine, names))
    if stage == 3:
        return list(partitioned_pieces(engine, names))
    return list(flat_pieces(engine, names))


def whole_pieces(engine: "DeepSpeedEngine", names: dict[int, str]) -> Iterator[Piece]:
    """Stage 0: every parameter whole, the master beside it in 16 bits or the parameter itself."""
    optimizer = engine.optimizer
    groups = [group["params"] for group in optimizer.param_groups]
    owners = getattr(optimizer, "fp16_groups", groups)
    for params, masters in zip(owners, groups, strict=True):
        for param, master in zip(params, masters, strict=True):
            yield Piece(names[id(param)], 0, master.numel(), master, 0)


def flat_pieces(engine: "DeepSpeedEngine", names: dict[int, str]) -> Iterator[Piece]:
    """Stages 1 and 2: each group is one flat tensor, cut in equal parts among the ranks."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "bf16_groups"):  # stage 1 with fp32 accumulation has a class of its own
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
    else:
        flats_of_groups = optimizer.single_partition_of_fp32_groups
        groups = zip(optimizer.bit16_groups, flats_of_groups, strict=True)
    for params, flat in groups:
        for param in params:
            mapping = param._hp_mapping
            if mapping is not None:
                owned, held = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(names[id(param)], owned.start, owned.numel, flat, held.start)


def partitioned_pieces(engine: "DeepSpeedEngine", names: dict[int, str]) -> Iterator[Piece]:
    """Stage 3: each parameter is cut in equal parts among the ranks, the last one padded."""
    optimizer = engine.optimizer
    rank = engine.global_rank
    for group in optimizer.fp16_groups:
        for param in group:
            index, flat_start, numel = optimizer.grad_position[optimizer.get_param_id(param)]
            start = rank * numel
            owned = min(numel, param.ds_numel - start)
            if owned > 0:
                flat = optimizer.fp32_partitioned_groups_flat[index]
                yield Piece(names[id(param)], start, owned, flat, flat_start)


def inner_state(engine: "DeepSpeedEngine", flat: "Tensor") -> dict[str, Any]:
    """The innermost optimizer's state of one of its tensors."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer.state[flat]


@contextmanager
def in_memory(
    engine: "DeepSpeedEngine", flat: "Tensor", is_changed: bool = False
) -> Iterator[None]:
    """Have one of the optimizer's tensors and its state here, where they lie on a disk otherwise.

    What ``is_changed`` meanwhile goes back to the disk.
    """
    optimizer, index = engine.optimizer, swapped_index(engine, flat)
    if index is not None:
        optimizer._optimizer_states_and_gradient_swap_in(index)
    yield
    if index is not None and is_changed:
        optimizer._writeback_swap_state(index, write_opt_state=True, write_gradients=False)
    elif index is not None:
        optimizer._release_swap_buffers(index)


def swapped_index(engine: "DeepSpeedEngine", flat: "Tensor") -> int | None:
    """The number of a tensor among stage 3's, if it lies on a disk between steps."""
    optimizer = engine.optimizer
    if not getattr(optimizer, "swap_optimizer", False):
        return None
    tensors = optimizer.fp32_partitioned_groups_flat
    index = next(index for index, tensor in enumerate(tensors) if tensor is flat)
    return index if optimizer._swappable_optimizer_subgroup(index) else None


def elementwise(state: dict[str, Any], flat: "Tensor") -> dict[str, "Tensor"]:
    """The states that hold one value for each value of the parameter."""
    return {
        name: value
        for name, value in state.items()
        if hasattr(value, "ndim") and value.ndim > 0 and value.shape == flat.shape
    }


def save(
    folder: RunFolder, engine: "DeepSpeedEngine", ranks: Ranks, step: int, extra: dict[str, Any]
) -> None:
    """Publish the state after ``step`` steps: all ranks write, then one rename makes it exist."""
    import torch.distributed as dist
    from safetensors.torch import save_file

    if folder.checkpoint(step).exists():
        return  # a published one is whole, and nothing was learned since
    temporary = folder.checkpoints / f".step_{step}.partial"
    if ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    if ranks.is_first or engine.zero_optimization_stage():  # at stage 0 every rank owns everything
        save_file(owned_tensors(engine), temporary / f"rank_{ranks.rank}.safetensors")
    save_file(random_state(), temporary / f"rng_{ranks.rank}.safetensors")
    dist.barrier()
    if ranks.is_first:
        write_json(temporary / "state.json", whole_state(engine, ranks, step, extra))
        publish(temporary, folder.checkpoint(step))
    dist.barrier()


def owned_tensors(engine: "DeepSpeedEngine") -> dict[str, "Tensor"]:
    """On the host all that this rank owns, by ``<state>|<parameter>|<offset>``.

    What lies there already is not copied: a second copy might not fit.

    States that are not elementwise (blocks of 8-bit values) are kept whole, by the number of their
    tensor: they fit the same ranks and stage only.
    """
    tensors: dict[str, Tensor] = {}
    for number, (flat, owned) in enumerate(by_flat(pieces(engine))):
        with in_memory(engine, flat):
            state = {MASTER: flat, **inner_state(engine, flat)}
            is_lent = swapped_index(engine, flat) is not None  # goes back to its disk
            tensors |= on_host(number, owned, state, copy=is_lent)
    return tensors


def on_host(
    number: int, owned: list[Piece], state: dict[str, Any], copy: bool
) -> dict[str, "Tensor"]:
    """On the host the pieces in the optimizer's tensor ``number``, and its state."""
    flat, tensors = owned[0].flat, {}
    for piece in owned:
        for name, values in elementwise(state, flat).items():
            part = piece.view(values.detach()).to("cpu", copy=copy)
            tensors[f"{name}|{piece.name}|{piece.start}"] = part
    for name, value in block_states(state, flat).items():
        tensors[f"{name}|#{number}|0"] = value.detach().to("cpu", copy=copy)
    return tensors


def by_flat(owned: list[Piece]) -> list[tuple["Tensor", list[Piece]]]:
    """Each of the optimizer's tensors, in order, with the pieces in it."""
    groups: dict[int, list[Piece]] = {}
    for piece in owned:
        groups.setdefault(id(piece.flat), []).append(piece)
    return [(group[0].flat, group) for group in groups.values()]


def block_states(state: dict[str, Any], flat: "Tensor") -> dict[str, "Tensor"]:
    """The tensors among the states that are neither elementwise nor single numbers."""
    whole = elementwise(state, flat)
    return {
        name: value
        for name, value in state.items()
        if hasattr(value, "ndim") and name not in whole and value.ndim > 0
    }


def scalars(state: dict[str, Any]) -> dict[str, Any]:
    """The single numbers among the states, and whether each is kept as a tensor."""
    numbers = {}
    for name, value in state.items():
        if isinstance(value, int | float):
            numbers[name] = {"value": value, "is_tensor": False}
        elif hasattr(value, "ndim") and value.ndim == 0:
            numbers[name] = {"value": float(value), "is_tensor": True}
    return numbers


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
        "scalars": [scalars(inner_state(engine, flat)) for flat, _ in by_flat(pieces(engine))],
        **extra,
    }


def scaler(engine: "DeepSpeedEngine") -> Any:
    """The object that holds the loss scale; None in fp32."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


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
    for name, value in saved["scaler"].items():
        if value is not None:
            setattr(scaler(engine), name, value)
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
    state = inner_state(engine, flat)
    restore_flat_state(state, flat, number, {piece.name for piece in owned}, saved, fragments)
    for piece in owned:
        for name, values in {MASTER: flat, **elementwise(state, flat)}.items():
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
        state[name] = torch.zeros_like(flat, dtype=fragments.dtype(name, names))
    for name in fragments.states_of({f"#{number}"}):
        state[name] = fragments.block(name, number).to(flat.device)
    layout = saved["scalars"]
    for name, scalar in layout[min(number, len(layout) - 1)].items():
        value = scalar["value"]
        state[name] = torch.tensor(value, device=flat.device) if scalar["is_tensor"] else value


class Fragments:
    """The pieces in all files of a checkpoint, found by state, parameter and offset."""

    def __init__(self, path: Path, rank: int) -> None:
        from safetensors import safe_open

        self.path = path
        self.own: Any = None
        self.places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for file in sorted(path.glob("rank_*.safetensors")):
            reader = safe_open(file, framework="pt")
            if file.stem == f"rank_{rank}":
                self.own = reader
            for key in reader.keys():  # noqa: SIM118  (not a dict)
                state, name, start = key.split("|")
                numel = reader.get_slice(key).get_shape()[0]
                place = (int(start), numel, reader, key)
                self.places.setdefault((state, name), []).append(place)

    def states_of(self, names: set[str]) -> set[str]:
        """The states that are kept of these parameters, or of a whole tensor (``#<number>``)."""
        return {state for state, name in self.places if name in names}

    def block(self, state: str, number: int) -> "Tensor":
        """A state that is kept whole: this rank's own, for it fits no other."""
        key = f"{state}|#{number}|0"
        own = [place for place in self.places[state, f"#{number}"] if place[2] is self.own]
        if not own:
            raise TrainingError(f"{self.path} has no {state} for this rank: use as many as before.")
        return own[0][2].get_tensor(key)  # type: ignore[no-any-return]

    def dtype(self, state: str, names: set[str]) -> "torch.dtype":
        """The dtype in which a state of one of these parameters is kept."""
        places = next(self.places[state, name] for name in names if (state, name) in self.places)
        return places[0][2].get_slice(places[0][3])[:0].dtype  # type: ignore[no-any-return]

    def fill(self, state: str, piece: Piece, target: "Tensor") -> None:
        """Copy into ``target`` whatever overlaps ``piece``. Raises TrainingError for a gap."""
        missing = piece.numel
        stop = piece.start + piece.numel
        for start, numel, reader, key in self.places.get((state, piece.name), []):
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


def prune(folder: RunFolder, keep: int) -> None:
    """Delete all but the newest checkpoints, and what an interrupted save left."""
    for step in folder.checkpoint_steps()[:-keep]:
        shutil.rmtree(folder.checkpoint(step))
    for leftover in folder.checkpoints.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
