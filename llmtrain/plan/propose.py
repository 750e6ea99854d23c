"""What would make a run fit, or clearly faster, if it were another run: proposed, never chosen."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.compose import choices
from llmtrain.config import Precision
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.plan.record import Plan

MOST = 3
WORTH = 1.2  # times faster
COUNTS = (2, 4, 8)  # of GPUs in a machine


class Change(NamedTuple):
    """Other choices of groups, as overrides, and other values by key."""

    groups: tuple[str, ...] = ()
    values: tuple[tuple[str, Any], ...] = ()

    @property
    def words(self) -> list[str]:
        """The change as overrides to add to a command."""
        return [
            *self.groups,
            *(f"{key}={getattr(value, 'value', value)}" for key, value in self.values),
        ]


PlanOf = Callable[[Change], "Plan"]


class Proposal(NamedTuple):
    """Overrides to add to a command, and the plan that they give."""

    words: list[str]
    plan: "Plan"

    def line(self, other: "Plan") -> str:
        """The overrides with what they bring."""
        plan = self.plan
        gains = [f"{plan.memory['device_peak_gib']:.1f} GiB a device"]
        if plan.total_hours is not None:
            gains.append(duration(plan.total_hours))
        if other.fits and is_faster(plan, other):
            gains.append(f"{times_faster(plan, other):.1f} times faster")
        return f"{' '.join(self.words)} ({', '.join(gains)})"

    def to_json(self) -> dict[str, Any]:
        plan = self.plan
        values = {"device_peak_gib": plan.memory["device_peak_gib"]}
        return {"overrides": self.words, **values, "total_hours": plan.total_hours}


def proposals(plan: "Plan", hardware: str, plan_of: PlanOf) -> list[Proposal]:
    """At most three: what makes a run fit that does not, or much faster one that gives way."""
    if plan.fits and plan.offload_optimizer == "none":
        return []
    found: list[Proposal] = []
    for change in changes(plan, hardware):
        try:
            proposal = Proposal(change.words, plan_of(change))
        except ConfigError:
            continue
        if proposal.plan.fits and (not plan.fits or is_faster(proposal.plan, plan)):
            found.append(proposal)
        if len(found) == MOST:
            break
    return found


def changes(plan: "Plan", name: str) -> Iterator[Change]:
    """What a user could change, the least first; ``name`` is that of the hardware."""
    if plan.optimizer == "adamw" and plan.device == "cuda":
        yield Change(("optimizer=adamw8bit",))
        yield Change(("optimizer=adamw8bit",), (("train.precision", Precision.bf16_pure),))
    if plan.adapter == "none" and plan.weights_fingerprint is not None:  # weights to adapt
        yield Change(("adapter=lora",))
        yield Change(("adapter=qlora",))
    elif plan.adapter in ("lora", "dora"):
        yield Change(("adapter=qlora",))
    if plan.device == "cuda":
        yield from (more_gpus(count, name) for count in COUNTS if count > plan.gpus_per_node)
    room = plan.memory_gib - plan.memory["reserved_gib"]
    if fixed_gib(plan) < room < plan.memory["device_peak_gib"]:
        for part in (2, 4, 8):
            yield Change(values=(("train.seq_len", plan.seq_len // part),))


def more_gpus(count: int, name: str) -> Change:
    """The preset of the same card with so many, which knows their host; else the number alone."""
    preset = f"{name.rpartition('x')[0]}x{count}"
    if preset in choices("hardware"):
        return Change((f"hardware={preset}",))
    return Change(values=(("hardware.gpus_per_node", count),))


def fixed_gib(plan: "Plan") -> float:
    """What a device holds however short the sequences are."""
    of_tokens = ("activations", "loss and temporaries")
    sizes = plan.memory["components"]
    return float(plan.memory["device_peak_gib"] - sum(sizes.get(name, 0) for name in of_tokens))


def figure(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def duration(hours: float) -> str:
    """Hours in the unit in which people say them."""
    units = [(1 / 3600, "s"), (1 / 60, "min"), (1.0, "h"), (24.0, "days"), (8766.0, "years")]
    size, name = [unit for unit in units if hours >= 2 * unit[0] or unit is units[0]][-1]
    return f"{figure(hours / size)} {name}"


def is_faster(plan: "Plan", other: "Plan") -> bool:
    return times_faster(plan, other) >= WORTH


def times_faster(plan: "Plan", other: "Plan") -> float:
    """How many times as fast; 1 where one of them is not known."""
    if plan.total_hours is None or other.total_hours is None:
        return 1.0
    return other.total_hours / plan.total_hours
