"""Everything up to a rank's first step: processes, data, engine, and the newest checkpoint."""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import checkpoint
from llmtrain.checkpoint.store import mirror_of, remove_leftovers
from llmtrain.config import RunConfig, load
from llmtrain.folder import RunFolder, write_json
from llmtrain.imports import import_deepspeed, uncollected
from llmtrain.meeting import slow_ranks
from llmtrain.metrics import Metrics
from llmtrain.mode.base import base_of
from llmtrain.plan import Plan
from llmtrain.probe import check_apart
from llmtrain.rank_run import Run, Sums
from llmtrain.ranks import Ranks
from llmtrain.records import start_count
from llmtrain.saving import empty_cache, report
from llmtrain.stability import Stability

if TYPE_CHECKING:
    from llmtrain.data.teacher_cache import TeacherCache

PACKAGES = ("llmtrain", "torch", "deepspeed", "transformers")  # whose versions a checkpoint names


def start(folder: RunFolder, ranks: Ranks) -> Run:
    """Everything up to the first step: ranks, data, engine, and the newest checkpoint."""
    from llmtrain.engine import build_engine, start_ranks

    config, plan = load(folder.config), Plan.load(folder.plan)
    newest = folder.newest_step
    report(folder, ranks, "running", newest, phase="starting ranks")
    if ranks.is_first:
        for place in checkpoint_places(config, folder):
            remove_leftovers(place)
    with uncollected():
        import_libraries(config, plan)
    device = start_ranks(plan, ranks, config.launcher.meeting_seconds)
    import torch
    import torch.distributed as dist

    from llmtrain.data.shards import Manifest

    if config.debug:
        torch.autograd.set_detect_anomaly(True)
    sources = json.loads(folder.manifest.read_text())
    manifest = Manifest.load(Path(sources["folder"]))
    control = dist.new_group(backend="gloo")
    if plan.num_nodes > 1 and (slow := slow_ranks(plan, control)) is not None:
        report(folder, ranks, "running", newest, phase="starting ranks", warning=slow)
    peak = peak_tflops(plan, control)
    if plan.device == "cpu":
        start_count()
    engine = build_engine(config, plan, manifest.vocabulary, device)
    run = Run(config, plan, folder, manifest, ranks, device, engine, control, peak)
    run.saver = saver_of(run)
    set_end_tokens(run)
    if plan.keep_documents_apart:
        for learner in (engine.module.learner, engine.module.teacher):
            check_apart(learner)
    run.sequences = run.open_split("train")
    if "teacher_targets" in sources:
        run.targets = open_targets(run, Path(sources["teacher_targets"]))
    resume(run)
    if ranks.is_first:
        write_first_files(run)
    if run.step == 0:
        torch.manual_seed(config.seed + ranks.rank)  # dropout differs between ranks
    empty_cache(run)
    return run


def checkpoint_places(config: RunConfig, folder: RunFolder) -> list[Path]:
    """Where a run's checkpoints lie: in its folder, and at the mirror."""
    asked = config.checkpoint.mirror
    return [folder.checkpoints, *([] if asked is None else [mirror_of(asked, folder)])]


def saver_of(run: Run) -> checkpoint.Saver:
    """What writes this run's checkpoints."""
    asked, versions = run.config.checkpoint, {name: version(name) for name in PACKAGES}
    mirror = next(iter(checkpoint_places(run.config, run.folder)[1:]), None)
    return checkpoint.Saver(
        run.folder,
        run.ranks,
        run.sum,
        checkpoint.Retention(asked.keep, asked.keep_every),
        {"identity": run.config.identity, "world_size": run.plan.world_size, "versions": versions},
        mirror,
        run.plan.saves_behind,
    )


def set_end_tokens(run: Run) -> None:
    """Let the model stop where a turn ends, too: the token by which the template ends an answer."""
    from llmtrain.data.template import end_ids

    if run.manifest.chat_template is None:
        return
    settings = base_of(run.engine.module.model).generation_config
    own = settings.eos_token_id
    ends = set(own if isinstance(own, list) else [own]) - {None}
    ends |= set(end_ids(run.manifest.vocabulary.folder, run.manifest.chat_template))
    settings.eos_token_id = sorted(ends)


def open_targets(run: Run, path: Path) -> "TeacherCache":
    """The teacher's probabilities that were prepared for this run."""
    from llmtrain.data.teacher_cache import TeacherCache
    from llmtrain.teaching import header_of

    return TeacherCache.open(path, header_of(run.config, run.plan, run.manifest))


def import_libraries(config: RunConfig, plan: Plan) -> None:
    """Import what would be imported on the way."""
    import_deepspeed(plan.device)
    import torch._dynamo
    import torch.utils.tensorboard
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.utils.logging import disable_progress_bar

    if config.train.compile or config.optimizer.names_compiler:
        import torch._inductor.compile_fx  # noqa: F401  (a second, so only where it is needed)
    disable_progress_bar()  # nobody watches a log
    if config.adapter.freezes:
        import peft  # noqa: F401
    hf_config = config.model.hf_config()
    AutoModelForCausalLM._model_mapping.get(type(hf_config), None)  # imports the model's module


def peak_tflops(plan: Plan, control: Any) -> float | None:
    """The peak of all ranks together: a datasheet's on GPUs, measured on CPUs."""
    import torch
    import torch.distributed as dist

    from llmtrain.throughput import measure_matmul_tflops

    if plan.peak_tflops is not None:
        return plan.peak_tflops * plan.world_size
    if plan.device != "cpu":
        return None
    dtype_name = "float32" if plan.has_wide_products else plan.dtype_name
    peak = torch.tensor(measure_matmul_tflops(plan.device, dtype_name))
    dist.all_reduce(peak, group=control)
    return float(peak)


def resume(run: Run) -> None:
    """Continue from the newest checkpoint, if there is one."""
    steps = run.folder.checkpoint_steps()
    if steps:
        saved = checkpoint.load(run.folder.checkpoint(steps[-1]), run.engine, run.ranks)
        run.step = run.saver.last_step = saved["step"]
        run.best_loss = saved["best_loss"] if saved["best_loss"] is not None else math.inf
        run.best_step = saved["best_step"]
        run.elapsed_seconds = saved["elapsed_seconds"]
        run.sums = Sums.restored(saved["sums"], run.ranks.is_first)
        run.stability = Stability.restored(saved.get("stability", {}))
    if run.ranks.is_first:
        run.metrics = Metrics(run.folder, run.step)
        run.renew_hooks()


def write_first_files(run: Run) -> None:
    """What the first rank alone knows: the engine's dictionary and the environment."""
    from llmtrain.artefacts import environment

    write_json(run.folder.deepspeed, run.engine.config)
    write_json(run.folder.environment, environment(run.plan.device))
