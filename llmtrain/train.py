"""What each rank runs: the one training loop, for every mode.

A rank reads its run folder and derives nothing: no Hydra, no planning.
"""

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmtrain import checkpoint
from llmtrain.checkpoint.store import mirror_of, remove_leftovers
from llmtrain.config import RunConfig, load
from llmtrain.errors import (
    FAILED,
    STOPPED,
    ConfigError,
    OutOfMemory,
    TrainingError,
    is_final,
    is_out_of_memory,
)
from llmtrain.evaluation import evaluate, take_sample
from llmtrain.folder import RunFolder, finite, write_json, write_text
from llmtrain.metrics import Metrics
from llmtrain.mode.base import base_of
from llmtrain.plan import Plan
from llmtrain.probe import check_apart
from llmtrain.rank_run import Run, Sums
from llmtrain.ranks import Ranks, die_with_parent, leave, show_stacks
from llmtrain.records import hyperparameters, log_step, start_count, summarise
from llmtrain.rollback import roll_back
from llmtrain.stability import Diverging, Stability
from llmtrain.step import step_batches, train_step

if TYPE_CHECKING:
    from llmtrain.data.teacher_cache import TeacherCache

STATUS_SECONDS = 1.0
PACKAGES = ("llmtrain", "torch", "deepspeed", "transformers")  # whose versions a checkpoint names
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def main(path: str) -> NoReturn:
    """Train the run in a folder as one of its ranks, and end this process."""
    die_with_parent()
    for number in STOP_SIGNALS:  # before the first step there is nothing to save
        signal.signal(number, lambda *_: os._exit(STOPPED))
    ranks = Ranks.from_environment()
    folder = RunFolder(path)
    redirect_output(folder.log(ranks.rank))
    show_stacks()
    folder.error(ranks.rank).unlink(missing_ok=True)
    try:
        train(folder, ranks)
    except BaseException as error:  # whatever it is, the process that watches us has to know
        note_failure(folder, ranks, error)
        os._exit(FAILED)  # a peer may be stuck in a collective: do not wait for it in atexit
    leave()


def redirect_output(path: Path) -> None:
    """Everything that this process and its libraries print goes to the rank's log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, sys.stdout.fileno())
    os.dup2(handle, sys.stderr.fileno())
    os.close(handle)


def note_failure(folder: RunFolder, ranks: Ranks, error: BaseException) -> None:
    """Leave the traceback in the log and one line for the user, with its time."""
    traceback.print_exc()
    sys.stderr.flush()
    if is_out_of_memory(error):
        error = OutOfMemory(error, num_steps=0)  # at the start
    text = str(error) if isinstance(error, ConfigError | TrainingError) else repr(error)
    steps = error.num_steps if isinstance(error, OutOfMemory) else None
    line = {"time": time.time(), "error": text, "traceback": traceback.format_exc()}
    line |= {"out_of_memory_after_steps": steps, "is_final": is_final(error)}
    write_json(folder.error(ranks.rank), line)


def train(folder: RunFolder, ranks: Ranks) -> None:
    """Start or continue the run and bring it to its end, or to a requested stop."""
    run = start(folder, ranks)
    install_stop_handler(run)
    with memory_watched(run):
        train_to_end(run)


@contextmanager
def memory_watched(run: Run) -> Iterator[None]:
    """Raise OutOfMemory, which says how far it went, for what libraries raise in its place."""
    first = run.step
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(error, run.step - first) from error


def train_to_end(run: Run) -> None:
    """All remaining steps, and what belongs before, between and after them."""
    if run.config.debug:
        show_first_batch(run)
    if run.step == 0:
        take_sample(run)
    run.engine.module.train()
    run.sums.start_clock()
    while run.step < run.plan.num_steps:
        train_step(run)
        run.step += 1
        try:
            run.stability.check(run.config.on_divergence)
            after_step(run)
        except Diverging as trouble:  # on all ranks alike
            run.heartbeat.rest()
            roll_back(run, trouble)
        run.heartbeat.stepped(run.step)
        if run.any(run.is_stopping):  # all leave after the same step
            run.heartbeat.rest()
            save_checkpoint(run)
            run.saver.settle()
            finish(run, "stopped")
            return
    run.heartbeat.rest()
    close(run)


def start(folder: RunFolder, ranks: Ranks) -> Run:
    """Everything up to the first step: ranks, data, engine, and the newest checkpoint."""
    from llmtrain.engine import build_engine, start_ranks

    config, plan = load(folder.config), Plan.load(folder.plan)
    newest = max(folder.checkpoint_steps(), default=0)
    report(folder, ranks, "running", newest, phase="starting ranks")
    if ranks.is_first:
        remove_leftovers(folder.checkpoints)
    device = start_ranks(plan, ranks)
    import torch
    import torch.distributed as dist

    from llmtrain.data.shards import Manifest

    if config.debug:
        torch.autograd.set_detect_anomaly(True)
    sources = json.loads(folder.manifest.read_text())
    manifest = Manifest.load(Path(sources["folder"]))
    control = dist.new_group(backend="gloo")
    peak = peak_tflops(plan, control)
    forced_imports(config, plan)
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


def saver_of(run: Run) -> checkpoint.Saver:
    """What writes this run's checkpoints."""
    asked, versions = run.config.checkpoint, {name: version(name) for name in PACKAGES}
    mirror = None if asked.mirror is None else mirror_of(asked.mirror, run.folder)
    return checkpoint.Saver(
        run.folder,
        run.ranks,
        run.sum,
        checkpoint.Retention(asked.keep, asked.keep_every),
        {"identity": run.config.identity, "world_size": run.plan.world_size, "versions": versions},
        mirror,
        run.plan.saves_behind,
    )


def empty_cache(run: Run) -> None:
    """Give back what torch keeps: the next phase asks for blocks of other sizes."""
    import torch

    if run.device.type == "cuda":
        torch.cuda.empty_cache()


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


def forced_imports(config: RunConfig, plan: Plan) -> None:
    """Import what would be imported on the way, and start the count of memory after it."""
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.utils.tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    if config.adapter.freezes:
        import peft  # noqa: F401
    hf_config = config.model.hf_config()
    AutoModelForCausalLM._model_mapping.get(type(hf_config), None)  # imports the model's module
    if plan.device == "cpu":
        start_count()


def peak_tflops(plan: Plan, control: Any) -> float | None:
    """The peak of all ranks together: a datasheet's on GPUs, measured on CPUs."""
    import torch
    import torch.distributed as dist

    from llmtrain.throughput import measure_matmul_tflops

    if plan.peak_tflops is not None:
        return plan.peak_tflops * plan.world_size
    if plan.device != "cpu":
        return None
    peak = torch.tensor(measure_matmul_tflops(plan.device, plan.dtype_name))
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


def write_first_files(run: Run) -> None:
    """What the first rank alone knows: the engine's dictionary and the environment."""
    from llmtrain.artefacts import environment

    write_json(run.folder.deepspeed, run.engine.config)
    write_json(run.folder.environment, environment(run.plan.device))


def install_stop_handler(run: Run) -> None:
    """A signal to stop is noted, and acted upon by all ranks together after the step."""

    def note(number: int, frame: Any) -> None:
        run.is_stopping = True

    for number in STOP_SIGNALS:
        signal.signal(number, note)


def after_step(run: Run) -> None:
    """Records, evaluation and checkpoint, each when it is due."""
    plan, step = run.plan, run.step
    if step % plan.log_every == 0 or run.is_last_step or step == 1:
        log_step(run)
    with run.off_the_clock():
        if step % plan.eval_every == 0 or run.is_last_step:
            evaluate_on_the_way(run)
        is_due = step % plan.checkpoint_every == 0 and not run.is_last_step
        if is_due and not run.stability.is_suspicious(run.config.on_divergence):
            save_checkpoint(run)
        run.saver.poll()
    more = {"eta_seconds": run.eta_seconds, **run.stability.status(), **problems(run)}
    report(run.folder, run.ranks, "running", step, every=STATUS_SECONDS, **more)


def evaluate_on_the_way(run: Run) -> None:
    """A held-out record; the best model so far is kept."""
    empty_cache(run)
    loss = evaluate(run, run.plan.eval_sequences)["eval_loss"]
    empty_cache(run)
    if loss < run.best_loss:
        run.best_loss, run.best_step = loss, run.step
        save_folder(run, run.folder.best, loss)


def show_first_batch(run: Run) -> None:
    """What the model is about to read, for the eye: text, ids and the labels they predict."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.manifest.vocabulary.folder)
    batch = next(step_batches(run))
    shapes = {name: tuple(values.shape) for name, values in batch.items()}
    ids, labels = (batch[name][0].tolist() for name in ("input_ids", "labels"))
    text = f"first batch: {shapes}\n{tokenizer.decode(ids)}\nids {ids}\nlabels {labels}\n"
    if run.ranks.is_first:
        write_text(run.folder.first_batch, text)


def save_checkpoint(run: Run) -> None:
    """Begin to save resumable state; it is published when all ranks have written their part."""
    empty_cache(run)
    if run.metrics is not None:
        run.metrics.sync()
    extra = {
        "best_loss": finite(run.best_loss),
        "best_step": run.best_step,
        "elapsed_seconds": run.elapsed_seconds,
        "sums": run.sums.saved(run.sum),
        "stability": run.stability.saved(),
    }
    copy, owns = run.plan.saves_behind, run.ranks.is_first or run.plan.zero_stage > 0
    run.saver.save(
        lambda: checkpoint.take(run.engine, run.ranks, run.step, extra, copy),
        owns * run.plan.memory["checkpoint_gib"] * 2**30,
        run.step,
    )


def problems(run: Run) -> dict[str, str]:
    """What status.json has to say of the last checkpoint, if it was not written."""
    what = run.saver.problem
    return {} if what is None else {"warning": f"The last checkpoint was not written: {what}."}


def save_folder(run: Run, path: Path, loss: float) -> None:
    """A Hugging Face folder of the model as it is now."""
    from llmtrain.artefacts import readme, save_model

    empty_cache(run)
    text = readme(
        run.plan.name,
        path,
        f"{run.step} steps, {run.step * run.plan.tokens_per_step:,} tokens, "
        f"held-out loss {loss:.4f}",
        opening=run.config.adapter.opening,
    )
    save_model(path, run.engine, run.manifest, text, run.ranks.is_first)


def close(run: Run) -> None:
    """The end of training: the closing evaluation, a sample, the final model and the summary."""
    save_checkpoint(run)
    run.saver.settle()
    report(run.folder, run.ranks, "running", run.step, phase="evaluating")
    values = evaluate(run, run.plan.final_eval_sequences, record=False)
    take_sample(run)
    save_folder(run, run.folder.final, values["eval_loss"])
    if run.metrics is not None:
        summary = summarise(run, values)
        run.metrics.hparams(hyperparameters(run), {"hparam/eval_loss": values["eval_loss"]})
        write_json(run.folder.summary, summary)
    finish(run, "done")


def finish(run: Run, state: str) -> None:
    """Leave the process group and say how the run ended."""
    import torch.distributed as dist

    if run.metrics is not None:
        run.metrics.close()
    dist.barrier(group=run.control)
    report(run.folder, run.ranks, state, run.step, **run.stability.status())
    dist.destroy_process_group()


_last_report = 0.0


def report(
    folder: RunFolder, ranks: Ranks, state: str, step: int, every: float = 0.0, **more: Any
) -> None:
    """Refresh status.json from the first rank, at most once in ``every`` seconds."""
    global _last_report
    if ranks.is_first and time.time() - _last_report >= every:
        folder.write_status(state, step, **more)
        _last_report = time.time()


if __name__ == "__main__":
    main(sys.argv[1])
