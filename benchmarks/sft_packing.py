"""Fine-tuning on rows of very different lengths, side by side with TRL's SFTTrainer.

    python -m benchmarks.sft_packing --make-trl FOLDER        once: installs TRL there, and measures
    python -m benchmarks.sft_packing --trl-python FOLDER/bin/python [--blocks 5] [--precision fp32]

A small Llama, rows of log-normal lengths (mean 107 tokens, at most 512), 8 sequences a step, loss
on the completions. All start from the same weights and read the same rows with the same AdamW.
Each measurement is a process of its own; the contestants take turns, each block with a seed of its
own. Tokens are real ones, filler left out, and the first of a document, which nothing predicts,
too. Prints a table and writes results/<date>-<machine>/sft_packing.json.
"""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from llmtrain.data.order import step_sequences
from llmtrain.data.sequences import PackedSequences
from llmtrain.data.shards import Manifest
from llmtrain.folder import RunFolder, write_json
from llmtrain.hardware import cpu_name
from llmtrain.metrics import read_records
from llmtrain.plan import Plan

HERE = Path(__file__).parent
MODEL = HERE.parent / "conf" / "model" / "llama_tiny.yaml"

SEQ_LEN = 512
BATCH = 8
MEDIAN_TOKENS = 69  # of a log-normal length; cut at the limit, the mean is 107
SIGMA = 1.0
FEWEST_TOKENS = 8
MOST_TOKENS = SEQ_LEN - 8  # cut out of its text, a row may become a few tokens longer
NUM_ROWS = 4000
NUM_HELD_OUT = 16
TEXT_DOCUMENTS = 200  # modules of the standard library, which the rows are cut from
LEARNING_RATE = 1e-3
LOG_EVERY = 5
SAME_LOSS = 0.2  # nats, of a first step: batches differ, weights and masks do not
WARM_UP = 5  # steps that are not measured; one that is logged

OURS = "llmtrain"
PACKING = {"packing": True}
# What TRL's documentation offers for speed on a CPU: no recomputation. One row at a time, so that
# attention covers 512 positions and not the 4,096 of 8 flattened rows, is our own finding.
FASTEST = PACKING | {
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": BATCH,
}
PEERS: dict[str, dict[str, Any]] = {
    "TRL default": {},
    "TRL packing": PACKING,
    "TRL fastest": FASTEST,
}
STEPS = {"TRL default": 60, "TRL packing": 10, "TRL fastest": 20, OURS: 20}  # measured in a block


@dataclass(frozen=True)
class Work:
    """What is trained: a folder with model and tokenizer, and files of rows."""

    model: Path
    rows: Path
    held_out: Path
    num_parameters: int
    mean_tokens: float
    longest_tokens: int


@dataclass(frozen=True)
class Used:
    """What a process and its children took: the largest one's resident peak, cores in the mean.

    Far fewer cores than for others in the run, and the machine was busy with something else.
    """

    peak_gib: float
    cores: float


@dataclass(frozen=True)
class Measured:
    """One process: its steps after the warm-up, and its logged losses [step, nats].

    ``data`` is the size of one pass over the rows, which has to be the same for all.
    """

    contestant: str
    block: int
    num_steps: int
    num_tokens: int
    seconds: float
    losses: list[tuple[int, float]]
    used: Used
    data: dict[str, int]
    packages: dict[str, str]

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def first_loss(self) -> float:
        """Of the weights that all start from."""
        return self.losses[0][1]

    @property
    def learns(self) -> bool:
        """Whether the loss is a number throughout, and lower at the end than at the start."""
        values = [loss for _, loss in self.losses]
        return all(map(math.isfinite, values)) and values[-1] < values[0]


def main() -> None:
    options = parse_options()
    if options.make_trl:
        options.trl_python = make_trl(options.make_trl)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        measured = list(bench.measure())
    found = report(bench, measured)
    show(found["rows"], bench.work)
    name = "sft_packing" + (f"_{options.precision}" if options.precision else "")
    place = options.out / f"{date.today()}-{platform.machine()}" / f"{name}.json"
    write_json(place, found)
    print(place)
    if found["problems"]:
        sys.exit("\n".join(found["problems"]))


def parse_options() -> argparse.Namespace:
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    trl = parser.add_mutually_exclusive_group(required=True)
    trl.add_argument("--trl-python", help="the interpreter of an environment that has TRL")
    trl.add_argument("--make-trl", type=Path, help="make that environment here first")
    parser.add_argument("--blocks", type=int, default=3, help="measurements of each contestant")
    parser.add_argument("--steps", type=int, help="measured in each, in place of each one's own")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="else each one's default")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.steps and options.steps % LOG_EVERY:
        parser.error(f"--steps {options.steps} is not a multiple of {LOG_EVERY}")
    return options


def make_trl(folder: Path) -> str:
    """An environment with TRL on the torch and transformers of ours; its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(folder.absolute() / "bin" / "python")
    words = ["-m", "pip", "install", "-q", "-r", str(HERE / "requirements-trl.txt")]
    subprocess.run([python, *words], check=True)
    return python


class Bench:
    """All measurements, in a folder that is thrown away."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.options = options
        self.work = make_work(folder)

    def measure(self) -> Iterator[Measured]:
        """Every contestant in turn, block after block."""
        for block in range(self.options.blocks):
            for name in [*PEERS, OURS]:
                found = self.ours(block) if name == OURS else self.peer(name, block)
                print(f"block {block}: {name} {found.tokens_per_second:,.0f} tok/s", flush=True)
                yield found

    def num_steps(self, name: str) -> int:
        """The steps to train, warm-up included."""
        return WARM_UP + (self.options.steps or STEPS[name])

    def peer(self, name: str, block: int) -> Measured:
        """TRL as it comes, but for what is the same for all and what the name says."""
        job, result = self.folder / "job.json", self.folder / "result.json"
        settings = trl_settings(self.options.precision) | PEERS[name]
        settings |= {"max_steps": self.num_steps(name), "seed": block}
        settings |= {"output_dir": str(self.folder / "trl")}
        paths = {"model": self.work.model, "rows": self.work.rows, "result": result}
        write_json(job, {"settings": settings} | {key: str(path) for key, path in paths.items()})
        used = self.run(self.options.trl_python, str(HERE / "peers" / "sft_trl.py"), str(job))
        found = json.loads(result.read_text())
        first, last = found["steps"][WARM_UP - 1], found["steps"][-1]
        return Measured(
            contestant=name,
            block=block,
            num_steps=len(found["steps"]) - WARM_UP,
            num_tokens=last["tokens"] - first["tokens"],
            seconds=last["seconds"] - first["seconds"],
            losses=found["losses"],
            used=used,
            data=found["data"],
            packages=found["packages"],
        )

    def ours(self, block: int) -> Measured:
        """The command that a user types, and the records that it leaves."""
        words = our_words(self.work, self.options.precision)
        words += [f"train.max_steps={self.num_steps(OURS)}", f"seed={block}"]
        words += [f"output_root={self.folder}", f"cache_root={self.folder / 'cache'}"]
        used = self.run(sys.executable, "-m", "llmtrain.run", *words, f"name=block_{block}")
        (path,) = self.folder.glob(f"block_{block}-*")
        folder = RunFolder(path)
        records = [record for record in read_records(folder.metrics) if "loss" in record]
        (first,) = (record for record in records if record["step"] == WARM_UP)
        last = records[-1]
        manifest, sequences = trained_on(folder)
        return Measured(
            contestant=OURS,
            block=block,
            num_steps=last["step"] - WARM_UP,
            num_tokens=count_tokens(sequences, block, range(WARM_UP, last["step"])),
            seconds=last["elapsed_seconds"] - first["elapsed_seconds"],
            losses=[(record["step"], record["loss"]) for record in records],
            used=used,
            data={
                "num_tokens": sequences.num_inputs,
                "num_learned": manifest.train.num_learned_tokens,
            },
            packages=json.loads(folder.environment.read_text())["packages"],
        )

    def run(self, *command: str) -> Used:
        """Run a process to its end."""
        log, start = self.folder / "log.txt", time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{log.read_text()[-4000:]}\nExit {process.returncode}: {shlex.join(command)}")
        cores = (usage.ru_utime + usage.ru_stime) / (time.perf_counter() - start)
        return Used(peak_gib=usage.ru_maxrss / 2**20, cores=cores)


def trl_settings(precision: str | None) -> dict[str, Any]:
    """What TRL is told: the batch, the length and the optimizer's mathematics."""
    settings = {
        "use_cpu": True,
        "max_length": SEQ_LEN,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": LOG_EVERY,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return settings | ({} if precision is None else {"bf16": precision == "bf16"})


def our_words(work: Work, precision: str | None) -> list[str]:
    """The same in our words; TRL's AdamW has torch's betas and no decay."""
    words = [
        *("mode=sft", "data=chat", f"data.path={work.rows}"),
        *(f"data.validation_path={work.held_out}", "train.eval_batches=1"),
        *("model=pretrained", f"model.path={work.model}"),
        *(f"train.seq_len={SEQ_LEN}", f"train.global_batch={BATCH}"),
        *(f"optimizer.lr={LEARNING_RATE}", "optimizer.beta2=0.999", "optimizer.weight_decay=0"),
        *("schedule=constant", "schedule.warmup_steps=0", f"train.log_every={LOG_EVERY}"),
    ]
    return words if precision is None else [*words, f"train.precision={precision}"]


def trained_on(folder: RunFolder) -> tuple[Manifest, PackedSequences]:
    """The prepared data of a run of ours."""
    plan = Plan.load(folder.plan)
    manifest = Manifest.load(Path(json.loads(folder.manifest.read_text())["folder"]))
    return manifest, PackedSequences(manifest, "train", plan.seq_len, plan.packing)


def count_tokens(sequences: PackedSequences, seed: int, steps: Iterable[int]) -> int:
    """The tokens of exactly the documents that these steps read."""
    chosen = [step_sequences(seed, step, BATCH, len(sequences)) for step in steps]
    rows = (sequences.rows[index] for step in chosen for index in step)
    return sum(int(sequences.lengths[row].sum()) for row in rows)


def make_work(folder: Path) -> Work:
    """The tokenizer, the model with random weights, and the rows."""
    from llmtrain.data.tokenizer import END_OF_DOCUMENT, train_bpe, write
    from llmtrain.model.causal_lm import CausalLM

    values = yaml.safe_load(MODEL.read_text())
    texts = list(islice(ascii_modules(), TEXT_DOCUMENTS))
    tokenizer = train_bpe(iter(texts), values["config"]["vocab_size"])
    eos_id = tokenizer.token_to_id(END_OF_DOCUMENT)
    ids = tokenizer.encode("".join(texts)).ids
    rows = make_rows(tokenizer, ids)
    lengths = [row_tokens(tokenizer, row) for row in rows]
    assert max(lengths) <= SEQ_LEN  # nobody cuts anything
    import torch

    torch.manual_seed(0)
    shape = CausalLM(name=MODEL.stem, architecture=values["architecture"], config=values["config"])
    model = shape.build(torch.float32, "eager", bos_token_id=eos_id, eos_token_id=eos_id)
    model.save_pretrained(folder / "model")
    write(tokenizer, folder / "model")
    return Work(
        model=folder / "model",
        rows=write_rows(folder / "rows.jsonl", rows[NUM_HELD_OUT:]),
        held_out=write_rows(folder / "held_out.jsonl", rows[:NUM_HELD_OUT]),
        num_parameters=model.num_parameters(),
        mean_tokens=float(np.mean(lengths[NUM_HELD_OUT:])),
        longest_tokens=max(lengths),
    )


def ascii_modules() -> Iterator[str]:
    """Texts that may be cut anywhere."""
    from llmtrain.data.source.stdlib import sources

    return (source.decode() for _, source in sources() if source.isascii())


def make_rows(tokenizer: Any, ids: list[int]) -> list[dict[str, str]]:
    """Stretches of a text, a third of each as prompt, of the lengths that were drawn."""
    drawn = np.random.default_rng(0).lognormal(math.log(MEDIAN_TOKENS), SIGMA, NUM_ROWS)
    lengths = np.clip(drawn.round(), FEWEST_TOKENS, MOST_TOKENS).astype(int).tolist()
    bounds = [0, *accumulate(lengths)]
    assert bounds[-1] <= len(ids)
    middles = [start + (stop - start) // 3 for start, stop in pairwise(bounds)]
    cuts = zip(bounds, middles, bounds[1:], strict=False)
    texts = [(tokenizer.decode(ids[a:b]), tokenizer.decode(ids[b:c])) for a, b, c in cuts]
    return [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in texts
        if completion.strip() and is_same_apart(tokenizer, prompt, completion)
    ]


def is_same_apart(tokenizer: Any, prompt: str, completion: str) -> bool:
    """Whether no token lies across: we tokenise the two parts apart, and TRL together."""
    parts = (prompt, completion)
    apart = [token for part in parts for token in tokenizer.encode(part).ids]
    return apart == tokenizer.encode(prompt + completion).ids


def row_tokens(tokenizer: Any, row: dict[str, str]) -> int:
    """The tokens of a row with the one that ends it."""
    return len(tokenizer.encode(row["prompt"] + row["completion"]).ids) + 1


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def find_problems(measured: list[Measured]) -> list[str]:
    """What makes a comparison void: other tokens, other weights, nothing learned."""
    ours = next(each for each in measured if each.contestant == OURS)
    found = []
    for each in measured:
        name = f"{each.contestant}, block {each.block}"
        if each.data != ours.data:
            found.append(f"{name}: reads {each.data} and not {ours.data}")
        if abs(each.first_loss - ours.first_loss) > SAME_LOSS:
            found.append(f"{name}: starts at {each.first_loss:.3f} and not {ours.first_loss:.3f}")
        if not each.learns:
            found.append(f"{name}: learns nothing, its losses are {each.losses}")
    return found


def summarise(measured: list[Measured]) -> list[dict[str, Any]]:
    """A row for each contestant."""
    of = {name: [each for each in measured if each.contestant == name] for name in [*PEERS, OURS]}
    return [row(name, theirs, of[OURS]) for name, theirs in of.items()]


def row(name: str, theirs: list[Measured], ours: list[Measured]) -> dict[str, Any]:
    """Medians over blocks, and how many times faster ours is, from the ratios within blocks."""
    rates = [each.tokens_per_second for each in theirs]
    pairs = zip(ours, theirs, strict=True)
    ratios = np.array([one.tokens_per_second / other.tokens_per_second for one, other in pairs])
    low, high = bootstrap(ratios)
    return {
        "contestant": name,
        "tokens_per_second": float(np.median(rates)),
        "ours_times_faster": float(np.median(ratios)),
        "ratio_low": low,
        "ratio_high": high,
        "num_steps": theirs[0].num_steps,
        "tokens_per_step": sum(each.num_tokens for each in theirs)
        / sum(each.num_steps for each in theirs),
        "seconds_per_step": float(np.median([each.seconds / each.num_steps for each in theirs])),
        "first_loss": float(np.median([each.first_loss for each in theirs])),
        "last_loss": float(np.median([each.losses[-1][1] for each in theirs])),
        "peak_gib": max(each.used.peak_gib for each in theirs),
        "cores": float(np.median([each.used.cores for each in theirs])),
    }


def bootstrap(values: Any) -> tuple[float, float]:
    """The 95 % interval of a median, by drawing blocks again (Efron 1979)."""
    drawn = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def show(rows: list[dict[str, Any]], work: Work) -> None:
    title = (
        f"{work.num_parameters / 1e6:.1f}M llama, rows of {work.mean_tokens:.0f} tokens in the "
        f"mean and {work.longest_tokens} at most, {BATCH} x {SEQ_LEN}"
    )
    table = Table(title=title, title_justify="left", box=None)
    for column in ("", "tok/s", "ours/it", "95 %", "steps x tok", "loss", "GiB", "cores"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for each in rows:
        table.add_row(
            each["contestant"],
            f"{each['tokens_per_second']:,.0f}",
            f"{each['ours_times_faster']:.2f}",
            f"{each['ratio_low']:.2f}-{each['ratio_high']:.2f}",
            f"{each['num_steps']} x {each['tokens_per_step']:,.0f}",
            f"{each['first_loss']:.2f}-{each['last_loss']:.2f}",
            f"{each['peak_gib']:.2f}",
            f"{each['cores']:.1f}",
        )
    Console().print(table)


def report(bench: Bench, measured: list[Measured]) -> dict[str, Any]:
    """All that was measured, and on what."""
    work, options = bench.work, bench.options
    return {
        "machine": cpu_name(),
        "platform": platform.platform(),
        "precision": options.precision or "each one's default",
        "work": {
            "model": MODEL.stem,
            "num_parameters": work.num_parameters,
            "mean_tokens": work.mean_tokens,
            "longest_tokens": work.longest_tokens,
            "one_pass": measured[0].data,
            "seq_len": SEQ_LEN,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
        },
        "settings": {
            **{name: trl_settings(options.precision) | PEERS[name] for name in PEERS},
            OURS: [word for word in our_words(work, options.precision) if "path=" not in word],
        },
        "warm_up_steps": WARM_UP,
        "problems": find_problems(measured),
        "rows": summarise(measured),
        "measured": [asdict(each) for each in measured],
    }


if __name__ == "__main__":
    main()
