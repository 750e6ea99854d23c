"""The largest preset of each mode that fits this machine, as a command to paste."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmtrain.doctor.line import Line, green, yellow
from llmtrain.errors import ConfigError
from llmtrain.hardware import GIB, Hardware, Machine, resolve
from llmtrain.plan.propose import duration

LONGEST_HOURS = 30 * 24.0

if TYPE_CHECKING:
    from llmtrain.plan import Plan


class Aim(NamedTuple):
    """A way to train: its overrides, whether it starts from stored weights, and the fewest bytes
    that any plan of it takes for a parameter, so that giants need no plan to be left out."""

    name: str
    words: tuple[str, ...]
    is_stored: bool
    least_bytes: float


class Preset(NamedTuple):
    name: str
    num_parameters: int
    is_stored: bool


TUNING = ("mode=sft", "data=stdlib_qa")
AIMS = [
    Aim("pretrain", ("mode=pretrain",), False, 8),
    Aim("sft", TUNING, True, 8),
    Aim("sft, LoRA", (*TUNING, "adapter=lora"), True, 2),
    Aim("sft, QLoRA", (*TUNING, "adapter=qlora"), True, 0.5),
    Aim("distill", ("mode=distill", "data=stdlib_raft"), True, 8),
]


def preset_lines(cache: Path) -> list[Line]:
    """A line for each way to train."""
    machine, presets = resolve(Hardware()), known_presets(cache)
    return [largest(aim, machine, presets) for aim in AIMS]


def known_presets(cache: Path) -> list[Preset]:
    """Every model preset that can be counted here, the largest first."""
    from llmtrain.compose import choices

    found = [preset for name in choices("model") if (preset := counted(name, cache))]
    return sorted(found, key=lambda preset: -preset.num_parameters)


def counted(name: str, cache: Path) -> Preset | None:
    """A preset's size; None for one that names no model by itself, as ``pretrained``."""
    from llmtrain.compose import composed

    try:
        model = composed([f"model={name}"]).model
        model.check()
        return Preset(name, model.facts(cache).num_parameters, model.path is not None)
    except ConfigError:
        return None


def largest(aim: Aim, machine: Machine, presets: list[Preset]) -> Line:
    """The first preset, from the largest down, of which there is a plan."""
    refusal = "no preset is small enough"
    room = total_bytes(machine)
    for preset in presets:
        if preset.is_stored is not aim.is_stored or preset.num_parameters * aim.least_bytes > room:
            continue
        words = [f"model={preset.name}", *aim.words]
        try:
            return fitting(aim.name, words, *planned(words))
        except ConfigError as error:
            refusal = str(error)
    found, _, remedy = refusal.rpartition("; ") if "; " in refusal else (refusal, "", "")
    return yellow(aim.name, found=found, remedy=remedy or "take more or larger devices")


def total_bytes(machine: Machine) -> float:
    """All memory of a machine; on a CPU the ranks have the host's and no more."""
    devices = machine.memory_gib * machine.world_size
    return (devices + (machine.host_memory_gib if machine.device == "cuda" else 0)) * GIB


def planned(words: list[str]) -> tuple["Plan", str | None]:
    """The plan, and where the weights come from. Raises ConfigError where it does not fit."""
    from llmtrain.compose import composed
    from llmtrain.plan import make_plan

    config = composed(words)
    plan = make_plan(config)
    if not plan.fits:
        raise ConfigError("model", plan.model, f"needs {plan.refusal}", "take a smaller one")
    if (plan.total_hours or 0.0) > LONGEST_HOURS:
        takes = f"takes {duration(plan.total_hours or 0.0)}"
        raise ConfigError("model", plan.model, takes, "take a smaller one")
    return plan, config.model.path


def fitting(name: str, words: list[str], plan: "Plan", weights: str | None) -> Line:
    """The preset, its memory, how long its recipe would take, and the command."""
    peak = f"{plan.memory['device_peak_gib']:.1f} GiB a device"
    hours = f", {duration(plan.total_hours)}" if plan.total_hours else ""
    size = f"{plan.num_parameters / 1e9:.2f}B parameters at {plan.seq_len} tokens"
    source = f", weights from {weights}" if weights else ""
    found = f"{plan.model}: {size}, {peak}{hours}{source}: the largest that fits within a month"
    return green(name, found=found, remedy=f"python -m llmtrain.run {' '.join(words)}")
