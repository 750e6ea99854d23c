"""A contestant's side of taking turns: it trains so many steps when it is told to, and waits.

Nothing here is llmtrain's: peers run it in an environment of their own.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Step = Callable[[], tuple[float, float]]  # trains one step: its loss, and the gradient's norm


class Turns:
    """Answers go where standard output went; whatever libraries print goes to standard error."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def take(self, step: Step) -> None:
        """Take turns until nobody asks for one."""
        for num_steps in self.asked():
            self.answer(*timed(step, num_steps))

    def asked(self) -> Iterator[int]:
        """How many steps each turn has."""
        self.say({"ready": True, "peak_gib": peak_gib()})
        for line in sys.stdin:
            yield int(line)

    def answer(self, seconds: float, steps: list[tuple[float, float]]) -> None:
        losses, norms = zip(*steps, strict=True)
        said = {"seconds": seconds, "losses": losses, "gradient_norms": norms}
        self.say(said | {"peak_gib": peak_gib()})

    def say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self.answers)


def timed(step: Step, num_steps: int) -> tuple[float, list[tuple[float, float]]]:
    begun = time.perf_counter()
    steps = [step() for _ in range(num_steps)]
    return time.perf_counter() - begun, steps


def peak_gib() -> float:
    """The most memory that this process ever had on its GPU, or resident where it has none."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
