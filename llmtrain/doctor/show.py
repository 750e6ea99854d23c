"""Lines on a terminal."""

from collections import Counter

from rich.console import Console
from rich.text import Text

from llmtrain.doctor.line import Line, State

STATE_WIDTH, NAME_WIDTH = 8, 15


def show(line: Line, console: Console) -> None:
    """One line, and its remedy below. Nothing is broken by us, so that commands can be pasted."""
    text = Text(line.state.value.ljust(STATE_WIDTH), style=line.state.value)
    text.append(line.name.ljust(NAME_WIDTH), style="bold").append(line.found, style="default")
    if line.remedy:
        text.append("\n" + " " * STATE_WIDTH + "-> ", style="dim").append(line.remedy, style="cyan")
    console.print(text, soft_wrap=True, highlight=False)


def summary(lines: list[Line]) -> str:
    """How many lines of each state."""
    counts = Counter(line.state for line in lines)
    return ", ".join(f"{counts[state]} {state.value}" for state in State)
