"""What to train a model of some size on: tokens, a mixture, disk and days, as commands to type."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmtrain.compose import choices, grid_points
from llmtrain.data.catalogue import (
    CONF,
    MOST_EPOCHS,
    OPTIMAL_TOKENS,
    Entry,
    entries,
    find_entry,
    parse_size,
    read_yaml,
    show_count,
)
from llmtrain.data.listing import WIDE
from llmtrain.errors import ConfigError, nearest
from llmtrain.plan import Plan, make_plan
from llmtrain.plan.propose import duration

if TYPE_CHECKING:
    from rich.console import Console

MIXTURES = CONF / "data" / "published" / "mixtures.yaml"
FAMILY = "llama_"  # of presets, for a size without one of its own
GIB = 2**30
HORIZONS = {  # tokens a parameter
    "compute-optimal": (OPTIMAL_TOKENS, "the lowest loss for this compute (Hoffmann et al. 2022)"),
    "over-trained": (200, "better at its size, and cheaper to use; Llama 3 8B saw 1,900"),
}


class Share(NamedTuple):
    """What a mixture takes from one data set: ``num_tokens`` are read, again from the start where
    it has fewer."""

    entry: Entry
    weight: float
    num_tokens: float

    @property
    def num_epochs(self) -> float:
        return self.num_tokens / self.entry.published.num_tokens

    @property
    def part(self) -> float:
        """How much of the data set is needed."""
        return min(1.0, self.num_epochs)

    @property
    def download_gib(self) -> float:
        return self.part * self.entry.published.download_gib

    def tokenised_gib(self, bytes_per_token: int) -> float:
        return self.part * self.entry.published.num_tokens * bytes_per_token / GIB


class Subject(NamedTuple):
    """The model that is asked about: a preset's plan, and how much larger than it the model is."""

    plan: Plan
    preset: str
    scale: float

    @property
    def num_parameters(self) -> float:
        """Those that take part in a token, by which text is reckoned."""
        return self.plan.num_active_parameters * self.scale

    def hours(self, num_tokens: float) -> float | None:
        """How long so many tokens take; None where the machine's rates are not known."""
        if self.plan.step_seconds is None:
            return None
        tokens_per_second = self.plan.tokens_per_step / self.plan.step_seconds / self.scale
        return num_tokens / tokens_per_second / 3600


def recommend(arguments: argparse.Namespace) -> None:
    """Print what to train a model on, and the commands that do it."""
    from rich.console import Console

    subject = subject_of(arguments.size, arguments.hardware)
    weights = weights_of(arguments.language)
    width = None if sys.stdout.isatty() else WIDE
    console = Console(highlight=False, soft_wrap=True, width=width)
    show_subject(subject, arguments, console)
    found = {}
    for name, (tokens, why) in HORIZONS.items():
        num_tokens = tokens * subject.num_parameters
        found[name] = mixture(weights, num_tokens)
        console.print(
            f"\n[bold]{name}[/]: {show_count(subject.num_parameters)} parameters x {tokens} = "
            f"[bold]{show_count(num_tokens)} tokens[/]; {why}"
        )
        show_mixture(found[name], subject, console)
    show_commands(found["compute-optimal"], subject, arguments, console)


def subject_of(size: str, hardware: str) -> Subject:
    """The preset of a size, or the nearest to it; ConfigError for what is neither size nor preset.

    What a step of it takes is planned on its own recipe, without any data here.
    """
    known = choices("model")
    preset, number = size, parse_size(size)
    if size not in known:
        if number is None:
            remedy = f"give one such as 350m or 7b, or a preset ({nearest(size, known)})"
            raise ConfigError("recommend", size, "is no size of a model", remedy)
        preset = nearest_preset(number, known)
    (point,) = grid_points([f"model={preset}", f"hardware={hardware}", "mode=pretrain", "data=c4"])
    if isinstance(point.config, ConfigError):
        raise point.config
    plan = make_plan(point.config)
    scale = 1.0 if number is None or size in known else number / plan.num_parameters
    return Subject(plan, preset, 1.0 if abs(scale - 1) < 0.1 else scale)


def nearest_preset(num_parameters: float, known: Sequence[str]) -> str:
    """The preset of the plainest family whose size is nearest, in proportion."""
    sizes = {name: parse_size(name.removeprefix(FAMILY)) for name in known if FAMILY in name}
    found = {name: size for name, size in sizes.items() if size and name.startswith(FAMILY)}
    return min(found, key=lambda name: abs(math.log(found[name] / num_parameters)))


def weights_of(language: str) -> dict[str, float]:
    """A mixture's shares by data set; ConfigError for a language without one."""
    known = read_yaml(MIXTURES)
    if language not in known:
        remedy = f"choose one of {', '.join(known)}"
        raise ConfigError("--language", language, "has no mixture", remedy)
    return dict(known[language])


def mixture(weights: dict[str, float], num_tokens: float) -> list[Share]:
    """So many tokens from these data sets, as the weights say, but none read above four times.

    What a small one cannot give, the others do. Only where all together have too few is one read
    more often.
    """
    families = {name: family_of(find_entry(name)) for name in weights}
    room = {name: MOST_EPOCHS * max(sizes_of(families[name])) / num_tokens for name in weights}
    shares = filled(weights, room)
    return [
        Share(smallest(families[name], share * num_tokens), share, share * num_tokens)
        for name, share in shares.items()
    ]


def filled(weights: dict[str, float], room: dict[str, float]) -> dict[str, float]:
    """Shares in proportion to the weights, each within its room; they add up to 1."""
    if sum(room.values()) <= 1:
        return {name: room[name] / sum(room.values()) for name in weights}
    full: set[str] = set()
    while True:
        left = 1 - sum(room[name] for name in full)
        free = sum(weights[name] for name in weights if name not in full)
        shares = {
            name: room[name] if name in full else left * weights[name] / free for name in weights
        }
        more = {name for name in shares if name not in full and shares[name] > room[name]}
        if not more:
            return shares
        full |= more


def family_of(entry: Entry) -> list[Entry]:
    """The data sets that are samples of one, the smallest first."""
    hub, language = entry.published.hub, entry.published.language
    same = [
        one for one in entries() if (one.published.hub, one.published.language) == (hub, language)
    ]
    return sorted(same, key=lambda one: one.published.num_tokens)


def sizes_of(family: Sequence[Entry]) -> list[float]:
    return [entry.published.num_tokens for entry in family]


def smallest(family: Sequence[Entry], num_tokens: float) -> Entry:
    """The smallest that has so many tokens, or the largest of all."""
    enough = [entry for entry in family if entry.published.num_tokens >= num_tokens]
    return enough[0] if enough else family[-1]


def show_subject(subject: Subject, arguments: argparse.Namespace, console: "Console") -> None:
    plan = subject.plan
    size = f"{plan.num_parameters:,} parameters"
    if plan.num_active_parameters != plan.num_parameters:
        size += f", {plan.num_active_parameters:,} active"
    console.print(f"model={subject.preset}: {size}")
    if subject.scale != 1.0:
        console.print(
            f"[yellow]There is no preset of {arguments.size}: times are those of model="
            f"{subject.preset}, times {subject.scale:.2f}, and whether it fits is not known.[/]"
        )
    if not plan.fits:
        console.print(f"[red]It does not fit hardware={arguments.hardware}:[/] {plan.refusal}")
    elif plan.step_seconds is not None:
        rate = f"{plan.tokens_per_step / plan.step_seconds:,.0f} tokens/s"
        console.print(f"hardware={arguments.hardware}: {rate}, by the plan")


def show_mixture(shares: Sequence[Share], subject: Subject, console: "Console") -> None:
    """The mixture as a table, its sums, and what is doubtful about it."""
    from rich.table import Table

    wide = 2 if subject.plan.vocab_size <= 2**16 else 4
    table = Table(box=None, pad_edge=False)
    table.add_column("data=", style="bold", no_wrap=True)
    for name in ("weight", "tokens", "of", "epochs", "download GiB", "tokenised GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for share in shares:
        table.add_row(
            share.entry.name,
            f"{share.weight:.1%}",
            show_count(share.num_tokens),
            show_count(share.entry.published.num_tokens),
            f"{share.num_epochs:.2f}",
            f"{share.download_gib:,.1f}",
            f"{share.tokenised_gib(wide):,.1f}",
        )
    raw = sum(share.download_gib for share in shares)
    tokenised = sum(share.tokenised_gib(wide) for share in shares)
    table.add_row("together", "", "", "", "", f"{raw:,.1f}", f"{tokenised:,.1f}", style="dim")
    console.print(table)
    hours = subject.hours(sum(share.num_tokens for share in shares))
    if hours is not None and subject.plan.fits:
        plan = subject.plan
        console.print(f"takes {duration(hours)} on {plan.world_size} x {plan.device_name}")
    for share in shares:
        if share.num_epochs > MOST_EPOCHS * 1.001:
            read = f"data={share.entry.name} is read {share.num_epochs:.1f} times"
            console.print(
                f"[yellow]warning:[/] {read}; past {MOST_EPOCHS} little is learned "
                "(Muennighoff et al. 2023)"
            )


def show_commands(
    shares: Sequence[Share], subject: Subject, arguments: argparse.Namespace, console: "Console"
) -> None:
    """What to type next for the compute-optimal mixture."""
    console.print("\n[bold]Next[/] (compute-optimal)")
    for share in shares:
        tokens = f" --tokens {token_word(share.num_tokens)}" if share.part < 1 else ""
        console.print(f"python -m llmtrain.data download {share.entry.name}{tokens}")
    num_tokens = sum(share.num_tokens for share in shares)
    words = [f"model={subject.preset}", f"hardware={arguments.hardware}", *mixed(shares)]
    for command in ("plan", "run"):
        line = f"python -m llmtrain.{command} {shlex.join(words)} train.max_tokens={num_tokens:.3g}"
        console.print(line, soft_wrap=True)


def mixed(shares: Sequence[Share]) -> list[str]:
    """The words of a data set, or of a mixture of several."""
    names = [share.entry.name for share in shares]
    if len(names) == 1:
        return [f"data={names[0]}"]
    total = sum(share.num_tokens for share in shares)
    sources = [f"+data@data.sources.{name}={name}" for name in names]
    weights = [f"data.weights.{x.entry.name}={x.num_tokens / total:.3g}" for x in shares]
    return ["data=mixture", *sources, *weights]


def token_word(num_tokens: float) -> str:
    """A number of tokens as ``download --tokens`` reads it, rounded up."""
    return f"{math.ceil(num_tokens / 1e6)}m" if num_tokens < 1e9 else f"{num_tokens / 1e9:.1f}b"
