"""What each rank runs: the one training loop, for every mode.

A rank reads its run folder and derives nothing: no Hydra, no planning.
"""

# B batch, L length

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import checkpoint
from llmtrain.config import RunConfig, load
from llmtrain.errors import FAILED, ConfigError, TrainingError
from llmtrain.folder import RunFolder, write_json
from llmtrain.metrics import Metrics, read_records
from llmtrain.plan import Plan
from llmtrain.ranks import Ranks, die_with_parent

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from llmtrain.data.sequences import TokenSequences
    from llmtrain.data.shards import Manifest

SAMPLE_TOKENS = 64
STATUS_SECONDS = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@dataclass
class Run:
    """One rank's view of a run: what was decided, and what is going on."""

    config: RunConfig
    plan: Plan
    folder: RunFolder
    manifest: "Manifest"
    ranks: Ranks
    device: "torch.device"
    engine: "DeepSpeedEngine"
    control: Any
    peak_tflops: float | None
    metrics: Metrics | None = None
    step: int = 0
    best_loss: float = math.inf
    elapsed_seconds: float = 0.0
    is_stopping: bool = False
    sums: "Sums" = field(default_factory=lambda: Sums())


@dataclass
class Sums:
    """What has gathered since the last record; tensors stay on the device until one is due."""

    loss: Any = 0.0
    tokens: int = 0
    sequences: int = 0
    steps: int = 0
    extras: dict[str, Any] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)


def main(path: str) -> None:
    """Train the run in a folder as one of its ranks. Never returns normally on failure."""
    die_with_parent()
    ranks = Ranks.from_environment()
    folder = RunFolder(path)
    redirect_output(folder.log(ranks.rank))
    folder.error(ranks.rank).unlink(missing_ok=True)
    try:
        train(folder, ranks)
    except BaseException as error:  # whatever it is, the process that watches us has to know
        note_failure(folder, ranks, error)
        os._exit(FAILED)  # a peer may be stuck in a collective: do not wait for it in atexit


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
    text = str(error) if isinstance(error, ConfigError | TrainingError) else repr(error)
    line = {"time": time.time(), "error": text, "traceback": traceback.format_exc()}
    write_json(folder.error(ranks.rank), line)


def train(folder: RunFolder, ranks: Ranks) -> None:
    """Start or continue the run and bring it to its end, or to a requested stop."""
    run = start(folder, ranks)
    install_stop_handler(run)
    if run.metrics is not None and run.step == 0:
        take_sample(run)
    elif run.step == 0:
        take_sample(run)
    run.engine.module.train()
    run.sums = Sums()
    while run.step < run.plan.num_steps:
        train_step(run)
        run.step += 1
        after_step(run)
        if agreed_to_stop(run):
            save_checkpoint(run)
            finish(run, "stopped")
            return
    close(run)


def start(folder: RunFolder, ranks: Ranks) -> Run:
    """Everything up to the first step: ranks, data, engine, and the newest checkpoint."""
    from llmtrain.engine import build_engine, start_ranks

    config, plan = load(folder.config), Plan.load(folder.plan)
    report(folder, ranks, "running", 0, phase="starting ranks")
    device = start_ranks(plan, ranks)
    import torch
    import torch.distributed as dist

    from llmtrain.data.shards import Manifest

    if config.debug:
        torch.autograd.set_detect_anomaly(True)
    manifest = Manifest.load(Path(json.loads(folder.manifest.read_text())["folder"]))
    control = dist.new_group(backend="gloo")
    peak = peak_tflops(plan, control)
    forced_imports(plan)
    engine = build_engine(config, plan, manifest.vocabulary, device)
    run = Run(config, plan, folder, manifest, ranks, device, engine, control, peak)
    resume(run)
    if ranks.is_first:
        write_first_files(run)
    torch.manual_seed(config.seed + ranks.rank) if run.step == 0 else None
    return run


def forced_imports(plan: Plan) -> None:
    """Import what would be imported on the way, and start the count of memory after it."""
    import torch.utils.tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    if plan.device == "cpu" and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets the resident high-water mark


def peak_tflops(plan: Plan, control: Any) -> float | None:
    """The peak of all ranks together: a datasheet's on GPUs, measured on CPUs."""
    import torch
    import torch.distributed as dist

    from llmtrain.engine import DTYPES
    from llmtrain.throughput import measure_matmul_tflops

    if plan.peak_tflops is not None:
        return plan.peak_tflops * plan.world_size
    if plan.device != "cpu":
        return None
    peak = torch.tensor(measure_matmul_tflops(plan.device, DTYPES[plan.precision]))
    dist.all_reduce(peak, group=control)
    return float(peak)


def resume(run: Run) -> None:
    """Continue from the newest checkpoint, if there is one."""
    steps = run.folder.checkpoint_steps()
    if steps:
        saved = checkpoint.load(run.folder.checkpoint(steps[-1]), run.engine, run.ranks)
        run.step = saved["step"]
        run.best_loss = saved["best_loss"] if saved["best_loss"] is not None else math.inf
        run.elapsed_seconds = saved["elapsed_seconds"]
    if run.ranks.is_first:
        run.metrics = Metrics(run.folder, run.step)


def write_first_files(run: Run) -> None:
    """What the first rank alone knows: the engine's dictionary and the environment."""
    from llmtrain.artefacts import environment
    from llmtrain.zero import deepspeed_config

    write_json(run.folder.deepspeed, deepspeed_config(run.plan, run.config.zero.extra))
    write_json(run.folder.environment, environment(run.plan.device))


def install_stop_handler(run: Run) -> None:
    """A signal to stop is noted, and acted upon by all ranks together after the step."""

    def note(number: int, frame: Any) -> None:
        run.is_stopping = True

    for number in STOP_SIGNALS:
        signal.signal(number, note)


def agreed_to_stop(run: Run) -> bool:
    """Whether any rank was asked to stop: all leave after the same step."""
    if run.ranks.world_size == 1:
        return run.is_stopping
    import torch
    import torch.distributed as dist

    asked = torch.tensor(int(run.is_stopping))
    dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=run.control)
    return bool(asked)


def train_step(run: Run) -> None:
    """One optimizer step over this rank's micro-batches of the global batch."""
    set_learning_rate(run)
    batches = list(step_batches(run))
    num_tokens = total_tokens(run, sum(int((batch["labels"] >= 0).sum()) for batch in batches))
    for batch in batches:
        loss = run.engine(batch)
        run.engine.backward(objective_value(run, loss, num_tokens), scale_wrt_gas=False)
        run.engine.step()
        run.sums.loss = run.sums.loss + loss.loss_sum.detach()
        for name, value in loss.extras.items():
            share = value.detach() / (len(batches) * run.ranks.world_size)
            run.sums.extras[name] = run.sums.extras.get(name, 0.0) + share
    run.sums.tokens += num_tokens
    run.sums.sequences += run.plan.global_batch
    run.sums.steps += 1


def objective_value(run: Run, loss: Any, num_tokens: int) -> "torch.Tensor":
    """A micro-batch's part of the mean over the whole step's tokens.

    The engine averages gradients over ranks, so the sum is multiplied by their number. A penalty
    is a mean over the micro-batch and counts by its share of the tokens.
    """
    total = loss.loss_sum + loss.penalty * loss.num_tokens
    value: torch.Tensor = total * (run.ranks.world_size / num_tokens)
    return value


def set_learning_rate(run: Run) -> None:
    """The rate of this step, as each group's own rate times the schedule's factor."""
    plan = run.plan
    factor = run.config.schedule.factor(run.step, plan.num_steps, plan.warmup_steps)
    for group in run.engine.optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * factor


def step_batches(run: Run) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of the current step, on its device."""
    from llmtrain.data.order import rank_share, step_sequences

    sequences = training_sequences(run)
    indices = step_sequences(run.config.seed, run.step, run.plan.global_batch, len(sequences))
    ranks = run.ranks
    for share in rank_share(indices, ranks.rank, ranks.world_size, run.plan.micro_batch):
        yield to_batch(run, sequences, share)


def training_sequences(run: Run) -> "TokenSequences":
    """The training split, memory-mapped once."""
    if not hasattr(run, "_sequences"):
        from llmtrain.data.sequences import TokenSequences

        run._sequences = TokenSequences(run.manifest, "train", run.plan.seq_len)  # type: ignore[attr-defined]
    return run._sequences  # type: ignore[attr-defined,no-any-return]


def to_batch(run: Run, sequences: "TokenSequences", indices: Any) -> dict[str, Any]:
    """The model's keyword arguments for some sequences, and their labels."""
    import torch

    input_ids_BL, labels_BL = sequences.read(indices)
    arrays = {"input_ids": input_ids_BL, "labels": labels_BL}
    if run.config.data.keep_documents_apart:
        arrays["position_ids"] = sequences.position_ids(indices)
    return {name: torch.from_numpy(array).to(run.device) for name, array in arrays.items()}


def total_tokens(run: Run, num_tokens: int) -> int:
    """The number of predicted tokens of a step over all ranks."""
    return int(sum_over_ranks(run, float(num_tokens)))


def sum_over_ranks(run: Run, value: float) -> float:
    """A number summed over all ranks, in double precision."""
    if run.ranks.world_size == 1:
        return value
    import torch
    import torch.distributed as dist

    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, group=run.control)
    return float(total)


def after_step(run: Run) -> None:
    """Records, evaluation and checkpoint, each when it is due."""
    plan, step = run.plan, run.step
    is_last = step == plan.num_steps
    if step % plan.log_every == 0 or is_last or step == 1:
        log_step(run)
    if step % plan.eval_every == 0 or is_last:
        evaluate_on_the_way(run)
    if step % plan.checkpoint_every == 0 and not is_last:
        save_checkpoint(run)
    report(run.folder, run.ranks, "running", step, every=STATUS_SECONDS)


def log_step(run: Run) -> None:
    """One record of what happened since the last one."""
    from llmtrain.throughput import model_flops_utilisation

    sums = run.sums
    loss = sum_over_ranks(run, float(sums.loss)) / sums.tokens
    extras = {name: sum_over_ranks(run, float(value)) / sums.steps for name, value in sums.extras.items()}
    if not math.isfinite(loss):
        raise TrainingError(f"The loss of step {run.step} is {loss}: lower optimizer.lr and start again.")
    seconds = time.perf_counter() - sums.start
    run.elapsed_seconds += seconds
    rate = sums.tokens / seconds
    values = {
        "step": run.step,
        "loss": loss,
        "lr": run.engine.optimizer.param_groups[0]["lr"],
        "grad_norm": gradient_norm(run),
        "tokens": run.step * run.plan.tokens_per_step,
        "tokens_per_second": rate,
        "samples_per_second": sums.sequences / seconds,
        "mfu": model_flops_utilisation(rate, run.plan.flops_per_token, run.peak_tflops),
        "memory_gib": peak_memory_gib(run),
        "step_seconds": seconds / sums.steps,
        "elapsed_seconds": run.elapsed_seconds,
        **extras,
    }
    if run.metrics is not None:
        run.metrics.record(values)
    run.sums = Sums()


def gradient_norm(run: Run) -> float:
    """The norm of the last step's gradient, before clipping and without the loss scale."""
    norm = run.engine.get_global_grad_norm()
    if norm is None:
        return math.nan
    scale = checkpoint.scaler(run.engine)
    has_scale = run.plan.precision == "fp16" and run.plan.zero_stage == 0
    return float(norm) / (scale.cur_scale if has_scale else 1.0)


def peak_memory_gib(run: Run) -> float:
    """The highest use so far: allocated on a GPU, resident beyond the imports on a CPU."""
    import torch

    if run.plan.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return math.nan


def evaluate_on_the_way(run: Run) -> None:
    """A held-out record; the best model so far is kept."""
    loss = evaluate(run, run.plan.eval_sequences)["eval_loss"]
    if loss < run.best_loss:
        run.best_loss = loss
        save_folder(run, run.folder.best, loss)
    run.sums.start = time.perf_counter()


def evaluate(run: Run, num_sequences: int, record: bool = True) -> dict[str, float]:
    """Loss, perplexity and bits per byte over the first held-out sequences, on all ranks."""
    import torch

    from llmtrain.data.sequences import TokenSequences

    sequences = TokenSequences(run.manifest, "held_out", run.plan.seq_len, cover_all=True)
    num_sequences = min(num_sequences, len(sequences))
    run.engine.module.eval()
    loss_sum, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in held_out_batches(run, sequences, num_sequences):
            loss = run.engine(batch)
            loss_sum += float(loss.loss_sum)
            num_tokens += int(loss.num_tokens)
    run.engine.module.train()
    loss_sum, num_tokens = sum_over_ranks(run, loss_sum), int(sum_over_ranks(run, float(num_tokens)))
    held_out = run.manifest.held_out
    num_bytes = held_out.num_bytes * num_tokens / max(1, held_out.num_tokens - 1)
    values = {
        "step": run.step,
        "eval_loss": loss_sum / num_tokens,
        "eval_perplexity": math.exp(min(loss_sum / num_tokens, 700.0)),
        "eval_bits_per_byte": loss_sum / math.log(2) / num_bytes,
    }
    if record and run.metrics is not None:
        run.metrics.record(values)
    return values


def held_out_batches(
    run: Run, sequences: "TokenSequences", num_sequences: int
) -> Iterator[dict[str, Any]]:
    """This rank's share, in micro-batches; every rank gets as many, the last ones without labels."""
    import numpy as np

    size, ranks = run.plan.micro_batch, run.ranks
    num_rounds = -(-num_sequences // (size * ranks.world_size))
    for number in range(num_rounds):
        first = (number * ranks.world_size + ranks.rank) * size
        indices = np.arange(first, first + size)
        batch = to_batch(run, sequences, np.minimum(indices, num_sequences - 1))
        batch["labels"][np.flatnonzero(indices >= num_sequences)] = -100
        yield batch


def take_sample(run: Run) -> str:
    """A text that the model writes from the beginning of a held-out sequence; on all ranks."""
    import torch
    from transformers import AutoTokenizer

    from llmtrain.data.sequences import TokenSequences

    tokenizer = AutoTokenizer.from_pretrained(run.manifest.vocabulary.folder)
    sequences = TokenSequences(run.manifest, "held_out", run.plan.seq_len, cover_all=True)
    prompt_BL = torch.from_numpy(sequences.read([0])[0][:, : min(16, run.plan.seq_len)])
    model = run.engine.module.model
    model.eval()
    with torch.no_grad():
        written_BL = model.generate(
            prompt_BL.to(run.device),
            attention_mask=torch.ones_like(prompt_BL, device=run.device),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
        )
    model.train()
    prompt = tokenizer.decode(prompt_BL[0])
    text = tokenizer.decode(written_BL[0, prompt_BL.shape[1] :])
    if run.metrics is not None:
        run.metrics.sample(run.step, prompt, text)
    return str(text)


def save_checkpoint(run: Run) -> None:
    """Publish resumable state, and drop the oldest."""
    if run.metrics is not None:
        run.metrics.sync()
    extra = {
        "best_loss": finite_or_none(run.best_loss),
        "elapsed_seconds": run.elapsed_seconds,
        "data_fingerprint": run.plan.data.fingerprint,
    }
    checkpoint.save(run.folder, run.engine, run.ranks, run.step, extra)
    if run.ranks.is_first:
        checkpoint.prune(run.folder, run.config.checkpoint.keep)
    run.sums.start = time.perf_counter()


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def save_folder(run: Run, path: Path, loss: float) -> None:
    """A Hugging Face folder of the model as it is now."""
    from llmtrain.artefacts import README, save_model

    readme = README.format(
        name=run.plan.name,
        steps=run.step,
        tokens=f"{run.step * run.plan.tokens_per_step:,}",
        loss=f", held-out loss {loss:.4f}",
        folder=path,
    )
    save_model(path, run.engine, run.manifest.vocabulary, readme, run.ranks.is_first)


def close(run: Run) -> None:
    """The end of training: the closing evaluation, a sample, the final model and the summary."""
    save_checkpoint(run)
    report(run.folder, run.ranks, "running", run.step, phase="evaluating")
    values = evaluate(run, run.plan.final_eval_sequences, record=False)
    take_sample(run)
    save_folder(run, run.folder.final, values["eval_loss"])
    if run.metrics is not None:
        summary = summarise(run, values)
        run.metrics.hparams(hyperparameters(run), {"hparam/eval_loss": values["eval_loss"]})
        write_json(run.folder.summary, summary)
    finish(run, "done")


def summarise(run: Run, values: dict[str, float]) -> dict[str, Any]:
    """What the closing summary shows."""
    samples = read_records(run.folder.samples)
    steps = [record for record in read_records(run.folder.metrics) if "loss" in record]
    plan = run.plan
    return {
        **values,
        "num_steps": plan.num_steps,
        "num_tokens": plan.num_tokens,
        "train_loss": steps[-1]["loss"],
        "tokens_per_second": plan.num_tokens / max(run.elapsed_seconds, 1e-9),
        "mfu": steps[-1]["mfu"],
        "memory_gib": max(record["memory_gib"] or 0.0 for record in steps),
        "elapsed_seconds": run.elapsed_seconds,
        "xz_bits_per_byte": run.manifest.held_out_xz_bits_per_byte,
        "held_out_bytes": run.manifest.held_out.num_bytes,
        "held_out_is_whole": plan.final_eval_sequences * plan.seq_len >= run.manifest.held_out.num_tokens - 1,
        "sample_prompt": samples[-1]["prompt"],
        "sample_before": samples[0]["text"],
        "sample_after": samples[-1]["text"],
    }


def hyperparameters(run: Run) -> dict[str, Any]:
    """The settings that tell runs apart in TensorBoard."""
    plan = run.plan
    return {
        "model": plan.model,
        "optimizer": run.config.optimizer.kind,
        "lr": plan.learning_rate,
        "schedule": run.config.schedule.kind,
        "global_batch": plan.global_batch,
        "seq_len": plan.seq_len,
        "precision": plan.precision,
        "seed": run.config.seed,
        "num_parameters": plan.num_parameters,
    }


def finish(run: Run, state: str) -> None:
    """Leave the process group and say how the run ended."""
    import torch.distributed as dist

    if run.metrics is not None:
        run.metrics.close()
    dist.barrier(group=run.control)
    report(run.folder, run.ranks, state, run.step)
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
