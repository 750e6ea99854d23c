"""`python -m llmtrain.plan`: what a run would be, anywhere."""

import json
import sys
from collections.abc import Iterable
from typing import Any

from llmtrain import compose
from llmtrain.compose import Point, grid_points
from llmtrain.config import Format, RunConfig
from llmtrain.errors import DONE, REFUSED, ConfigError
from llmtrain.folder import finite
from llmtrain.plan.grid import planned
from llmtrain.plan.known import plan_as_known, planner
from llmtrain.plan.propose import proposals
from llmtrain.plan.record import Plan
from llmtrain.plan.table import show_grid, show_plan


def plan_command(config: RunConfig) -> int:
    """Print what a run would be, and what would suit better; nothing is written but caches.

    Returns 0 for a plan that fits and 2 for one that does not.
    """
    plan = plan_as_known(config)
    found = proposals(plan, config.hardware.name, planner(config))
    if config.format is Format.json:
        more = {"proposals": [proposal.to_json() for proposal in found]}
        print(json.dumps(for_json(plan.to_json() | more), indent=2))
    else:
        show_plan(plan, found)
    return DONE if plan.fits else REFUSED


def grid_command(points: Iterable[Point]) -> int:
    """One row a point. Returns 0 if any point fits, else 2."""
    known = list(planned(points))
    plans = [(point.words, plan) for point, plan in known]
    if any(as_json(point.config) for point, _ in known):
        print(json.dumps(for_json([point_json(*point) for point in plans]), indent=2))
    else:
        show_grid(plans)
    return DONE if any(isinstance(plan, Plan) and plan.fits for _, plan in plans) else REFUSED


def multirun(words: list[str]) -> int:
    return grid_command(grid_points(words))


def as_json(config: RunConfig | ConfigError) -> bool:
    return isinstance(config, RunConfig) and config.format is Format.json


def for_json(value: Any) -> Any:
    """The same with null for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: for_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    return finite(value)


def point_json(words: list[str], plan: Plan | ConfigError) -> dict[str, Any]:
    values = (
        {"fits": False, "error": str(plan)} if isinstance(plan, ConfigError) else plan.to_json()
    )
    return {"overrides": words, **values}


if __name__ == "__main__":
    summary = "Print the plan of a run: what it would be, anywhere. With -m one row a point."
    sys.exit(compose.main(plan_command, "plan", summary, multirun))
