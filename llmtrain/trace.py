"""What was seen of a micro-batch's forward and backward: bytes that live when, and each op.

A deep model is seen with few of its layers, in small micro-batches: bytes and ops are affine in the
number of layers, and in the micro-batch between and beyond those that are seen.
"""

from bisect import bisect
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

BEFORE_GRADIENTS = ("forward", "loss")  # and the backward pass of the loss
WITH_GRADIENTS = ("head", "top", "bottom")
PHASES = BEFORE_GRADIENTS + WITH_GRADIENTS


class Setting(NamedTuple):
    """What a trace depends on beside the config's model, adapter, mode and length.

    Of all positions ``learned_share`` have a label that is learned.
    """

    dtype: str
    attention: str
    scan_kernel: str | None
    recompute: str
    device: str
    threads: int
    is_packed: bool
    has_wide_products: bool
    learned_share: float = 1.0


@dataclass(frozen=True)
class Sample:
    """What was seen of one micro-batch, in bytes.

    ``peaks`` are, for each phase, the most that lived beside weights and gradients, and the most
    with the gradients that had been made by then. ``kept`` is what the forward pass of the body
    leaves for the backward pass.
    """

    num_layers: int
    batch: int
    peaks: dict[str, tuple[float, float]]
    kept: float
    ops: list[Any]


@dataclass(frozen=True)
class Weights:
    """Parameters by what happens to them: counts of what is trained, bytes of what is not.

    ``num_tensors`` are trained. A frozen weight that is quantised counts as its packed values.
    ``num_hidden`` of what is trained are in matrices between the embedding and the head, whose
    shapes are ``matrices``. Sizes are pairs: elements of a trained tensor, bytes of a frozen one,
    and how many there are of it.
    """

    num_trainable: int
    num_frozen: int
    num_tensors: int
    num_hidden: int
    largest: int
    matrices: list[list[int]]
    frozen_bytes: float
    buffer_bytes: float
    teacher_bytes: float
    trained_sizes: list[list[int]]
    frozen_sizes: list[list[int]]


@dataclass(frozen=True)
class Trace:
    """Samples of few layers and small micro-batches; what any other takes follows from them.

    ``doubt`` says why it is a rough estimate, where the model could not be traced.
    """

    num_layers: int
    weights: Weights
    samples: tuple[Sample, ...]
    doubt: str | None = None

    def peak(self, batch: int, phases: tuple[str, ...], with_gradients: bool) -> float:
        """The most that lives in some phases of a micro-batch's forward and backward, in bytes."""
        column = int(with_gradients)
        return max(self.at(batch, lambda s, p=phase: s.peaks[p][column]) for phase in phases)

    def kept(self, batch: int) -> float:
        """What lives between the body's forward and backward pass, in bytes."""
        return self.at(batch, lambda sample: sample.kept)

    def at(self, batch: int, value: Any) -> float:
        """A sample's value at the whole depth and ``batch``, by a line in each."""
        batches = sorted({sample.batch for sample in self.samples})
        along = [self.deep([s for s in self.samples if s.batch == b], value) for b in batches]
        return line(batches, along, batch)

    def deep(self, samples: list[Sample], value: Any) -> float:
        depths = [sample.num_layers for sample in samples]
        return line(depths, [value(sample) for sample in samples], self.num_layers)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Trace":
        samples = tuple(Sample(**sample) for sample in values["samples"])
        return cls(values["num_layers"], Weights(**values["weights"]), samples, values["doubt"])


def line(places: list[int], values: list[float], wanted: int) -> float:
    """The value at ``wanted`` on the lines from each of some points, in order, to the next.

    The first and the last go on beyond their points; a single point's line comes from 0.
    """
    if wanted in places:
        return float(values[places.index(wanted)])
    if len(places) == 1:
        return values[0] * wanted / places[0]
    after = min(max(bisect(places, wanted), 1), len(places) - 1)
    (one, at_one), (two, at_two) = list(zip(places, values, strict=True))[after - 1 : after + 1]
    return at_one + (at_two - at_one) / (two - one) * (wanted - one)
