"""The plans of many points."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, groupby, islice
from multiprocessing import get_context

from llmtrain.compose import Point
from llmtrain.errors import ConfigError
from llmtrain.hardware import num_cores
from llmtrain.plan.known import plan_or_refusal
from llmtrain.plan.record import Plan
from llmtrain.ranks import die_with_parent

FEW_POINTS = 24  # are planned sooner than a second process is started


def planned(points: Iterable[Point]) -> Iterator[tuple[Point, Plan | ConfigError]]:
    """The plan of each point, a large grid's on all cores while the rest is still composed."""
    points = iter(points)
    few = list(islice(points, FEW_POINTS))
    if len(few) < FEW_POINTS:
        yield from zip(few, plans_of(few), strict=True)
        return
    with ProcessPoolExecutor(num_cores(), get_context("spawn"), die_with_parent) as processes:
        parts = [(part, processes.submit(plans_of, part)) for part in by_model(chain(few, points))]
        for part, plans in parts:
            yield from zip(part, plans.result(), strict=True)


def by_model(points: Iterable[Point]) -> Iterator[list[Point]]:
    """Parts of a grid: points of one model lie together, so that one process traces it."""
    for _, alike in groupby(points, lambda point: getattr(point.config, "model", None)):
        while part := list(islice(alike, FEW_POINTS)):
            yield part


def plans_of(points: Iterable[Point]) -> list[Plan | ConfigError]:
    return [plan_or_refusal(point.config) for point in points]
