"""What a rank owns of weights and optimizer state, wherever DeepSpeed keeps it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

MASTER = "master"
MOMENTUM = "momentum_buffer"  # Muon's
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


def whole_matrices(engine: "DeepSpeedEngine", flat: "Tensor") -> list[Piece]:
    """Where in Muon's momentum its matrices lie, each whole, at stages 1 and 2 on the device.

    A rank keeps there the momentum of every matrix that it owns a part of; elsewhere, and for
    other optimizers, it is laid out like ``flat`` and nothing is given.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "params_in_partition") or optimizer.cpu_offload:
        return []
    flats = optimizer.single_partition_of_fp32_groups
    group = next(index for index, tensor in enumerate(flats) if tensor is flat)
    names = {id(param): name for name, param in engine.module.model.named_parameters()}
    found, start = [], 0
    for param in optimizer.params_in_partition[group]:
        if getattr(param, "use_muon", False):
            found.append(Piece(names[id(param)], 0, param.numel(), flat, start))
            start += param.numel()
    return found


def named_scalars(engine: "DeepSpeedEngine") -> list[dict[str, Any]]:
    """The single numbers of each of the optimizer's tensors, with the parameters they are of.

    These are all of its group: one rank writes for all, and owns a part of each group alone.
    """
    found = []
    for flat, owned in by_flat(pieces(engine)):
        values = scalars(inner_state(engine, flat))
        found.append({"names": names_in(engine, flat, owned), "values": values})
    return found


def names_in(engine: "DeepSpeedEngine", flat: "Tensor", owned: list[Piece]) -> list[str]:
    """The parameters of which any rank has a part in a tensor like this one."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return [piece.name for piece in owned]
    names = {id(param): name for name, param in engine.module.model.named_parameters()}
    if stage == 3:
        flats, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
    elif hasattr(optimizer, "bf16_groups"):
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    else:
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    group = next(params for tensor, params in zip(flats, groups, strict=True) if tensor is flat)
    return [names[id(param)] for param in group]


def by_flat(owned: list[Piece]) -> list[tuple["Tensor", list[Piece]]]:
    """Each of the optimizer's tensors, in order, with the pieces in it."""
    groups: dict[int, list[Piece]] = {}
    for piece in owned:
        groups.setdefault(id(piece.flat), []).append(piece)
    return [(group[0].flat, group) for group in groups.values()]


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


def scaler(engine: "DeepSpeedEngine") -> Any:
    """The object that holds the loss scale; None in fp32."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)
