"""What one check found, in one line."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial


class State(str, Enum):
    """``red``: nothing or little will train so. ``yellow``: worth knowing. ``green``: all well."""

    green = "green"
    yellow = "yellow"
    red = "red"


@dataclass(frozen=True)
class Line:
    """One check: its name, its state, what was found, and what to do about it.

    ``setting`` is a line of shell that repairs it by itself; ``--fix`` writes it. The remedy of a
    preset that fits is the command that trains it.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    setting: str = ""


green = partial(Line, state=State.green)
yellow = partial(Line, state=State.yellow)
red = partial(Line, state=State.red)

Check = Callable[[], list[Line]]


def look(name: str, check: Check) -> list[Line]:
    """What a check finds; a check that fails is a finding too, never a traceback."""
    try:
        return check()
    except Exception as error:  # a driver, a disk or a library may fail in any way
        what = " ".join(str(error).split()) or type(error).__name__
        remedy = "try what the line is about by hand"
        return [yellow(name, found=f"could not be looked at: {what[:200]}", remedy=remedy)]
