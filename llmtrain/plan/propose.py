"""What would make a run fit, or clearly faster, if it were another run: proposed, never chosen."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.plan.record import Plan

MOST = 3
WORTH = 1.2  # times faster

PlanOf = Callable[[list[str]], "Plan"]


class Proposal(NamedTuple):
    """Overrides to add to a command, and the plan that they give."""

    words: list[str]
    plan: "Plan"

    def line(self, other: "Plan") -> str:
        """The overrides with what they bring."""
        plan = self.plan
        gains = [f"{plan.memory['device_peak_gib']:.1f} GiB a device"]
        if plan.total_hours is not None:
            gains.append(f"{figure(plan.total_hours)} h")
        if other.fits and is_faster(plan, other):
            gains.append(f"{times_faster(plan, other):.1f} times faster")
        return f"{' '.join(self.words)} ({', '.join(gains)})"

    def to_json(self) -> dict[str, Any]:
        plan = self.plan
        values = {"device_peak_gib": plan.memory["device_peak_gib"]}
        return {"overrides": self.words, **values, "total_hours": plan.total_hours}


def proposals(plan: "Plan", plan_of: PlanOf) -> list[Proposal]:
    """At most three: what makes a run fit that does not, or much faster one that gives way."""
    if plan.fits and plan.offload_optimizer == "none":
        return []
    found: list[Proposal] = []
    for words in changes(plan):
        try:
            proposal = Proposal(words, plan_of(words))
        except ConfigError:
            continue
        if proposal.plan.fits and (not plan.fits or is_faster(proposal.plan, plan)):
            found.append(proposal)
        if len(found) == MOST:
            break
    return found


def changes(plan: "Plan") -> Iterator[list[str]]:
    """What a user could change, the least first."""
    if plan.optimizer == "adamw" and plan.device == "cuda":
        yield ["optimizer=adamw8bit"]
        yield ["optimizer=adamw8bit", "train.precision=bf16_pure"]
    if plan.adapter == "none" and plan.weights_fingerprint is not None:  # weights to adapt
        yield ["adapter=lora"]
        yield ["adapter=qlora"]
    elif plan.adapter in ("lora", "dora"):
        yield ["adapter=qlora"]
    if plan.device == "cuda":
        counts = [count for count in (2, 4, 8) if count > plan.gpus_per_node]
        yield from ([f"hardware.gpus_per_node={count}"] for count in counts)
    for part in (2, 4, 8):
        yield [f"train.seq_len={plan.seq_len // part}"]


def figure(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def is_faster(plan: "Plan", other: "Plan") -> bool:
    return times_faster(plan, other) >= WORTH


def times_faster(plan: "Plan", other: "Plan") -> float:
    """How many times as fast; 1 where one of them is not known."""
    if plan.total_hours is None or other.total_hours is None:
        return 1.0
    return other.total_hours / plan.total_hours
