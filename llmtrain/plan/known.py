"""The plan of a command, as much as is known of its data; again with changes; or its refusal."""

from collections.abc import Callable
from contextlib import suppress

from llmtrain.checks import check
from llmtrain.compose import composed, overrides
from llmtrain.config import RunConfig
from llmtrain.data.shards import find_manifest
from llmtrain.errors import ConfigError
from llmtrain.plan.make import make_plan
from llmtrain.plan.propose import proposals
from llmtrain.plan.record import Plan


def require_fit(plan: Plan) -> None:
    """Raise ConfigError for a plan that does not fit, with what would make it fit."""
    if plan.fits:
        return
    found = proposals(plan, planner())
    lines = [proposal.line(plan) for proposal in found]
    remedy = "what fits: " + "; ".join(lines) if lines else "take a smaller model or more devices"
    raise ConfigError("model", plan.model, f"needs {plan.refusal}", remedy)


def planner() -> Callable[[list[str]], Plan]:
    """A function that plans this command again with some overrides more."""
    words = overrides()
    return lambda more: plan_as_known(composed([*words, *more]))


def plan_as_known(config: RunConfig) -> Plan:
    """The plan of a config, with its corpus counted where it was tokenised before."""
    check(config)
    manifest = None
    with suppress(ConfigError):  # no tokenizer yet, say: a plan needs none, and a run will ask
        manifest = find_manifest(config.data, config.cache, config.tokenizer_path)
    return make_plan(config, manifest)


def plan_or_refusal(config: RunConfig | ConfigError) -> Plan | ConfigError:
    try:
        return config if isinstance(config, ConfigError) else plan_as_known(config)
    except ConfigError as error:
        return error
