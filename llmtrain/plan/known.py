"""The plan of a command, as much as is known of its data; again with changes; or its refusal."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from llmtrain.checks import check
from llmtrain.compose import composed, overrides
from llmtrain.config import RunConfig
from llmtrain.data.shards import find_manifest
from llmtrain.errors import ConfigError, TrainingError
from llmtrain.plan.make import make_plan
from llmtrain.plan.propose import Change, proposals
from llmtrain.plan.record import Plan


def require_fit(config: RunConfig, plan: Plan) -> None:
    """Raise ConfigError for a plan that does not fit, with what would make it fit."""
    if plan.fits:
        return
    found = proposals(plan, config.hardware.name, planner(config))
    lines = [proposal.line(plan) for proposal in found]
    remedy = "what fits: " + "; ".join(lines) if lines else "take a smaller model or more devices"
    raise ConfigError("model", plan.model, f"needs {plan.refusal}", remedy)


def planner(config: RunConfig) -> Callable[[Change], Plan]:
    """A function that plans this command again with a change.

    Composing takes a tenth of a second, so it is done once for each choice of groups.
    """
    words = overrides()
    known: dict[tuple[str, ...], RunConfig] = {(): config}

    def plan_of(change: Change) -> Plan:
        if change.groups not in known:
            known[change.groups] = composed([*words, *change.groups])
        return plan_as_known(with_values(known[change.groups], change.values))

    return plan_of


def with_values(config: RunConfig, values: Iterable[tuple[str, Any]]) -> RunConfig:
    """A config with other values at keys like ``train.seq_len``."""
    for key, value in values:
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def plan_as_known(config: RunConfig) -> Plan:
    """The plan of a config, with its corpus counted where it was tokenised before."""
    check(config)
    manifest = None
    with suppress(
        ConfigError, TrainingError
    ):  # no tokenizer yet, say: a plan needs none, and a run will ask
        manifest = find_manifest(config.data, config.cache, config.tokenizer_path)
    return make_plan(config, manifest)


def plan_or_refusal(config: RunConfig | ConfigError) -> Plan | ConfigError:
    try:
        return config if isinstance(config, ConfigError) else plan_as_known(config)
    except ConfigError as error:
        return error
