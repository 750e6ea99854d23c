"""A grid: every combination of the values that are given."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from llmtrain.errors import ConfigError
from llmtrain.schema import Part, unlearned


class Direction(Enum):
    minimize = "minimize"
    maximize = "maximize"


@dataclass
class Grid(Part):
    """All points, ``num_parallel`` at a time, which share this machine's devices and cores.

    ``objectives`` are figures of a run's summary and which way each is better, minimize or
    maximize (null: ``{eval_loss: minimize}``); the first decides what is best. ``name`` is that of
    the sweep's own folder.
    """

    kind: str = "grid"
    searches: ClassVar[bool] = False
    name: str = unlearned("grid")
    num_parallel: int = unlearned(1, low=1)
    objectives: Any = unlearned()

    @property
    def goals(self) -> dict[str, Direction]:
        """The objectives as they are meant."""
        asked = self.objectives or {"eval_loss": "minimize"}
        return {str(name): Direction(direction) for name, direction in asked.items()}

    def check(self) -> None:
        """Raise ConfigError for what contradicts itself."""
        known = [direction.value for direction in Direction]
        given = self.objectives
        if given is not None and not (given and isinstance(given, dict)):
            remedy = "write figures of summary.json as {eval_loss: minimize}"
            raise ConfigError("sweep.objectives", given, "says no directions", remedy)
        for name, direction in (given or {}).items():
            if direction not in known:
                key, remedy = f"sweep.objectives.{name}", f"choose one of {', '.join(known)}"
                raise ConfigError(key, direction, "is no direction", remedy)
        if not self.name or "/" in self.name or self.name.startswith("."):
            remedy = "leave out / and a leading dot"
            raise ConfigError("sweep.name", self.name, "cannot name a folder", remedy)
