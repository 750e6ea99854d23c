"""Compose, plan, write the run folder, launch: the whole story of `python -m llmtrain.run`."""

import os
import signal
import sys
import traceback
from functools import partial
from multiprocessing import parent_process

from llmtrain.config import RunConfig
from llmtrain.errors import FAILED, ConfigError
from llmtrain.on_finish import Afterwards


def main() -> int:
    """Train each run of the command line, then do what was asked for after the end."""
    from llmtrain import compose

    for number in (signal.SIGTERM, signal.SIGUSR2):  # as Ctrl+C, until there are ranks to ask
        signal.signal(number, signal.default_int_handler)
    afterwards = Afterwards()
    summary = "Train an experiment, or continue it where it stopped."
    try:
        multirun = partial(run_points, afterwards=afterwards)
        code = compose.main(partial(run, afterwards=afterwards), "run", summary, multirun)
    except Exception:  # ours to mend, and no reason for a rented machine to stay on
        traceback.print_exc()
        code = FAILED
    afterwards.shut_down(code)
    return code


def run(config: RunConfig, afterwards: Afterwards | None = None) -> float | None:
    """Train what the config asks for, or continue it; returns the final held-out loss."""
    from llmtrain.branch import parent_of
    from llmtrain.checks import check, check_given_tokenizer, check_here
    from llmtrain.data.shards import find_manifest, prepare
    from llmtrain.job import Job
    from llmtrain.plan import make_plan
    from llmtrain.plan.known import require_fit
    from llmtrain.plan.table import show_plan
    from llmtrain.rehearsal import rehearse
    from llmtrain.teaching import check_tokenizers, prepare_targets
    from llmtrain.zero import deepspeed_config

    if afterwards is None or not config.launcher.starts_ranks:
        afterwards = Afterwards()  # nothing follows a rehearsal
    refuse_wrapper()
    check(config)
    config.tracker.check_here()
    if config.sweep.searches and parent_process() is None:
        raise ConfigError("sweep", config.sweep.name, "is a search of many runs", "add -m")
    # Refused now if it cannot be: afterwards reading and tokenising may take hours.
    known = find_manifest(config.data, config.cache, config.tokenizer_path)
    estimated = make_plan(config, known)
    require_fit(config, estimated)
    parent_of(config, estimated)
    deepspeed_config(estimated, config.zero.extra)
    config.launcher.check(estimated.device, estimated.gpus_per_node, estimated.num_nodes)
    if config.launcher.starts_ranks:
        offloads = (estimated.offload_optimizer, estimated.offload_params)
        check_here(config, estimated.device, *offloads)
    if known is None:
        check_given_tokenizer(config)
    with afterwards.preparing(config.on_finish):
        manifest = prepare(config.data, config.cache, config.tokenizer_path)
    for model in (config.model, config.teacher):
        if model is not None:
            model.check_weights()
    check_tokenizers(config, manifest.vocabulary)
    plan = make_plan(config, manifest)
    show_plan(plan)
    if not config.launcher.starts_ranks:
        rehearse(config, plan, manifest)
        return None
    with afterwards.preparing(config.on_finish):
        targets = prepare_targets(config, plan, manifest)
    job = Job(config, plan, manifest, targets)
    return job.train(afterwards)


def run_points(words: list[str], afterwards: Afterwards) -> int:
    """Train each point of a multirun; returns the exit code."""
    from llmtrain.trials import sweep

    return sweep(words, run, afterwards)


def refuse_wrapper() -> None:
    """Ranks are started by us: under torchrun or deepspeed every rank would start its own."""
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"):
        if name in os.environ:
            reason = "is set by torchrun or deepspeed, and llmtrain starts its own ranks"
            remedy = f"run: python -m llmtrain.run {' '.join(sys.argv[1:])}".rstrip()
            raise ConfigError(name, os.environ[name], reason, remedy)


if __name__ == "__main__":
    sys.exit(main())
