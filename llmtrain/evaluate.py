"""Judge a finished model: perplexity, answers against references, RAFT structure, lm-eval tasks."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtrain.config import RunConfig
from llmtrain.data.corpus import Corpus
from llmtrain.data.example import Example, LossOn
from llmtrain.data.examples import ExampleCorpus
from llmtrain.data.raft import score_answer
from llmtrain.data.shards import Manifest
from llmtrain.data.source.raft import Raft
from llmtrain.errors import ConfigError, nearest
from llmtrain.finished import (
    Finished,
    attempt,
    command,
    config_of,
    find_model,
    open_finished,
    open_manifest,
    options_of,
    run_folder,
    tokenizer_of,
)
from llmtrain.folder import RunFolder, write_json
from llmtrain.held_out import (
    Loss,
    documents_of,
    examples_of,
    passage,
    passage_losses,
    sequence_losses,
    sequences_of,
    spread,
)
from llmtrain.scores import Comparison, exact_match, paired_bootstrap, rouge_l, token_f1
from llmtrain.writing import Ids, Sampling, Writer, shortened, template_of

EXAMPLES = """examples:
  python -m llmtrain.evaluate outputs/<run>
  python -m llmtrain.evaluate outputs/<run> --baseline outputs/<other>
  python -m llmtrain.evaluate Qwen/Qwen2.5-0.5B --data mine.jsonl
"""
LM_EVAL = "lm-eval:"
LEAST_PAIRS = 5  # that an interval can be drawn from
SEQ_LEN = 1024  # of a model that is no run of ours, where it has as many positions
WEIGHTS = {  # of a record's scores in their mean; the others count once
    "loss": "num_tokens",
    "bits_per_byte": "num_bytes",
    "reference_loss": "num_tokens",
    "uses_oracle": "num_oracles",
}

Record = dict[str, Any]


def main(words: list[str] | None = None) -> int:
    """Evaluate as the command line says, and return the exit code."""
    return command(evaluate, parser().parse_args(words))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = options_of("evaluate", __doc__, EXAMPLES)
    options.add_argument("--data", help="a file or a choice of conf/data; default: the run's own")
    options.add_argument(
        "--suite", default="auto", help="auto, perplexity, answers, raft, or lm-eval:TASK"
    )
    options.add_argument("--baseline", help="another model to compare with, on the same text")
    options.add_argument("--which", default="auto", help="final, best, or a checkpoint's step")
    options.add_argument("--limit", type=int, help="at most so many, from all over the data")
    options.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    options.add_argument("--seq-len", type=int, help="tokens read at once; default: as trained")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--out", help="write the result to this .json file")
    options.add_argument("--json", action="store_true", help="print the result as JSON")
    return options


@dataclass(frozen=True)
class Task:
    """What is measured, on what, and how.

    With a ``manifest`` the held-out split is read as training reads it. Else ``corpus`` is read
    document by document, all of it or those held out.
    """

    suite: str
    corpus: Corpus
    only_held_out: bool
    manifest: Manifest | None
    seq_len: int | None
    limit: int | None
    batch_size: int
    max_new_tokens: int


@dataclass(frozen=True)
class Result:
    """A model's mean scores, and those of each sequence, document or answer."""

    which: str
    metrics: dict[str, float]
    records: list[Record]


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure, compare, show and keep. Raises ConfigError for what cannot be measured."""
    check(arguments)
    config = config_of(arguments.run)
    measure = measure_lm_eval if arguments.suite.startswith(LM_EVAL) else measure_suite
    task = None if measure is measure_lm_eval else task_of(arguments, config)
    after = measure(arguments, arguments.run, arguments.which, arguments.base, task)
    before = None
    if arguments.baseline:
        before = measure(arguments, arguments.baseline, "auto", None, task)
    compared = compare(before.records, after.records) if before else {}
    report = report_of(arguments, task, before, after, compared)
    keep(report, arguments, run_folder(arguments.run) if config is not None else None)
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        show(report, before, after, compared)


def check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a value that no evaluation can use."""
    for name in ("limit", "max_new_tokens", "seq_len", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "is below 1", "give 1 or more")
    known = ("auto", *SUITES)
    if arguments.suite not in known and not arguments.suite.startswith(LM_EVAL):
        remedy = f"{nearest(arguments.suite, known)}, or say {LM_EVAL}TASK"
        raise ConfigError("--suite", arguments.suite, "is no suite", remedy)


def task_of(arguments: argparse.Namespace, config: RunConfig | None) -> Task:
    """What the command line asks of a model."""
    corpus = corpus_of(arguments.data, arguments.run, config)
    only_held_out = arguments.data is None or is_choice(arguments.data)
    suite = suite_of(arguments.suite, corpus)
    manifest = None
    if arguments.data is None and suite == "perplexity":
        manifest = shared_manifest(run_folder(arguments.run), arguments.baseline)
    trained_len = config.train.seq_len if config is not None else None
    return Task(
        suite=suite,
        corpus=corpus,
        only_held_out=only_held_out,
        manifest=manifest,
        seq_len=arguments.seq_len or trained_len,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )


def suite_of(asked: str, corpus: Corpus) -> str:
    """The suite that was asked for; ``auto``: the one for this kind of data."""
    if asked == "auto":
        answered = "raft" if isinstance(corpus, Raft) else "answers"
        return answered if isinstance(corpus, ExampleCorpus) else "perplexity"
    needed = {"raft": Raft, "answers": ExampleCorpus}.get(asked, Corpus)
    if not isinstance(corpus, needed):
        reason = f"does not fit data={corpus.name}, which holds no such rows"
        raise ConfigError("--suite", asked, reason, "take perplexity, or give --data")
    return asked


def shared_manifest(folder: RunFolder, baseline: str | None) -> Manifest | None:
    """The run's own tokens, unless the baseline has other tokens: then documents are compared."""
    manifest = open_manifest(folder)
    if baseline is None:
        return manifest
    ours = tokenizer_of(manifest.vocabulary.folder).get_vocab()
    return manifest if tokenizer_of(find_model(baseline)).get_vocab() == ours else None


def corpus_of(data: str | None, run: str, config: RunConfig | None) -> Corpus:
    """The run's own data, a file, or a choice of conf/data."""
    if data is None:
        if config is None:
            reason = f"is needed: {run} is no run folder and has no data of its own"
            raise ConfigError("--data", None, reason, "give a file or a choice of conf/data")
        own: Corpus = config.data
        return own
    corpus = data_of_choice(data) if is_choice(data) else corpus_at(data, config)
    corpus.check()
    return corpus


def data_of_choice(choice: str) -> Corpus:
    """A choice of conf/data with its defaults."""
    from llmtrain.compose import composed

    corpus: Corpus = composed([f"data={choice}"]).data
    return corpus


def is_choice(data: str) -> bool:
    from llmtrain.compose import choices

    return data in choices("data") and not Path(data).exists()


def corpus_at(path: str, config: RunConfig | None) -> Corpus:
    """A file, folder or hub name; it is read as the run's own data where they are of one kind."""
    kind = kind_of(path)
    own = config.data if config is not None else None
    if own is not None and own.kind == kind:
        given = {"validation_path": None} if isinstance(own, ExampleCorpus) else {}
        corpus: Corpus = replace(own, path=path, **given)
        return corpus
    corpus = replace(data_of_choice(kind), path=path)
    if isinstance(own, Raft) and isinstance(corpus, Raft):  # asked as it was taught
        corpus = replace(corpus, prompt=own.prompt, sections=own.sections)
    return corpus


def kind_of(path: str) -> str:
    """The kind of data that a file is, told by its first row."""
    from llmtrain.compose import choices
    from llmtrain.data.formats import format_of_row
    from llmtrain.data.rows import is_hub_name, read_rows

    file = Path(path).expanduser()
    if not file.exists() and not is_hub_name(path):
        remedy = f"give a file, or of conf/data {nearest(path, choices('data'))}"
        raise ConfigError("--data", path, "is no file and no choice of conf/data", remedy)
    if file.suffix in (".txt", ".md"):
        return "text"
    row = next(iter(read_rows(path, raise_it, "--data")), None)
    form = "unknown" if row is None else format_of_row(row.values)
    return form if form in ("raft", "text") else "chat"


def raise_it(error: ConfigError) -> None:
    raise error


def measure_suite(
    arguments: argparse.Namespace, run: str, which: str, base: str | None, task: Task | None
) -> Result:
    """Open a model and measure it."""
    assert task is not None
    finished = open_finished(run, which, arguments.device, base)
    records = SUITES[task.suite](finished, task)
    if not records:
        reason = "leaves nothing to measure"
        raise ConfigError("--data", arguments.data, reason, "give longer text, or raise --seq-len")
    return Result(finished.which, means(records), records)


def means(records: list[Record]) -> dict[str, float]:
    """The mean of each score, weighted as :data:`WEIGHTS` says, and the perplexity."""
    found: dict[str, float] = {}
    for name in score_names(records):
        weights = weights_of(records, name)
        if any(weights):
            total = sum(
                weight * record[name] for weight, record in zip(weights, records, strict=True)
            )
            found[name] = total / sum(weights)
    if "loss" in found:
        found["perplexity"] = math.exp(min(found["loss"], 700.0))
    return found


def score_names(records: list[Record]) -> list[str]:
    """What a record's scores are: its numbers, but for counts."""
    counts = WEIGHTS.values()
    return [
        name
        for name, value in records[0].items()
        if isinstance(value, float) and name not in counts
    ]


def weights_of(records: list[Record], name: str) -> list[float]:
    weight = WEIGHTS.get(name)
    return [1.0 if weight is None else float(record[weight]) for record in records]


def perplexity(finished: Finished, task: Task) -> list[Record]:
    """Loss and bits per byte of each held-out sequence, or of each document."""
    seq_len = length_of(finished, task)
    if task.manifest is None:
        return document_records(finished, task, seq_len)
    keep_apart = getattr(task.corpus, "keep_documents_apart", False)
    sequences = sequences_of(task.manifest, seq_len, keep_apart)
    indices = spread(range(len(sequences)), task.limit)
    losses = sequence_losses(finished, sequences, indices, task.batch_size)
    split = task.manifest.held_out
    bytes_per_token = split.num_bytes / split.num_learned_tokens
    records = [
        loss_record(index, str(index), loss, bytes_per_token * loss.num_tokens)
        for index, loss in zip(indices, losses, strict=True)
    ]
    return [record for record in records if record["num_tokens"]]


def document_records(finished: Finished, task: Task, seq_len: int) -> list[Record]:
    documents = documents_of(task.corpus, finished.tokenizer, task.only_held_out)
    documents = spread(documents, task.limit)
    passages = [passage(finished.tokenizer, document) for document in documents]
    losses = passage_losses(finished, passages, seq_len, task.batch_size)
    return [
        loss_record(number, document.place or document.id, loss, document.num_learned_bytes)
        for number, (document, loss) in enumerate(zip(documents, losses, strict=True))
        if loss.num_tokens and document.num_learned_bytes
    ]


def length_of(finished: Finished, task: Task) -> int:
    """How many tokens are read at once; ConfigError for more than the model has positions."""
    most = finished.num_positions
    seq_len = task.seq_len or min(most or SEQ_LEN, SEQ_LEN)
    if most is not None and seq_len > most:
        reason = f"is more than the {most} positions of {finished.run}"
        raise ConfigError("--seq-len", seq_len, reason, f"give at most {most}")
    return seq_len


def loss_record(number: int, name: str, loss: Loss, num_bytes: float) -> Record:
    return {
        "number": number,
        "id": name,
        "loss": loss.nats / max(1, loss.num_tokens),
        "bits_per_byte": loss.nats / math.log(2) / max(num_bytes, 1e-9),
        "num_tokens": loss.num_tokens,
        "num_bytes": num_bytes,
    }


def answers(finished: Finished, task: Task) -> list[Record]:
    """Greedy answers beside their references, and what the references themselves cost."""
    assert isinstance(task.corpus, ExampleCorpus)
    examples = spread(examples_of(task.corpus, task.only_held_out), task.limit)
    writer = Writer(finished, Sampling(task.max_new_tokens))
    prompts = [prompt_of(writer, example) for example in examples]
    read = [shortened(writer, prompt) for prompt in prompts]
    written = writer.write(read, task.batch_size)
    losses = reference_losses(finished, examples, task)
    return [
        {
            "number": number,
            **answer_record(example, answer.text, loss),
            "num_prompt_tokens": len(prompt),
            "prompt_was_cut": len(shorter) < len(prompt),
        }
        for number, (example, prompt, shorter, answer, loss) in enumerate(
            zip(examples, prompts, read, written, losses, strict=True)
        )
    ]


def prompt_of(writer: Writer, example: Example) -> Ids:
    """All before the last answer, as training writes it."""
    if example.messages:
        return writer.asked(example.messages[:-1])
    return writer.plain(example.prompt)


def reference_losses(finished: Finished, examples: list[Example], task: Task) -> list[Loss]:
    from llmtrain.data.corpus import Document

    template = template_of(finished.tokenizer)
    rendered = [template.rendered(example, LossOn.last) for example in examples]
    passages = [passage(finished.tokenizer, Document("", *pair)) for pair in rendered]
    return passage_losses(finished, passages, length_of(finished, task), task.batch_size)


def answer_record(example: Example, answer: str, loss: Loss) -> Record:
    reference = example.messages[-1].content if example.messages else example.completion
    question = example.messages[-2].content if len(example.messages) > 1 else example.prompt
    return {
        "id": example.id,
        "question": question,
        "answer": answer.strip(),
        "reference": reference,
        "exact_match": exact_match(answer, reference),
        "f1": token_f1(answer, reference),
        "rouge_l": rouge_l(answer, reference),
        "reference_loss": loss.nats / max(1, loss.num_tokens),
        "num_tokens": loss.num_tokens,
    }


def raft(finished: Finished, task: Task) -> list[Record]:
    """Answers, and whether they have their sections and quote the documents they were given."""
    assert isinstance(task.corpus, Raft)
    sections = task.corpus.sections
    wanted = task.corpus.prompt.sections if sections is None else sections
    examples = spread(examples_of(task.corpus, task.only_held_out), task.limit)
    records = answers(finished, task)
    return [
        record | structure(record["answer"], example, wanted)
        for record, example in zip(records, examples, strict=True)
    ]


def structure(answer: str, example: Example, sections: list[str]) -> Record:
    score = score_answer(answer, example, sections)
    return {
        "section_share": float(score.section_share),
        "quote_share": float(score.quote_share),
        "uses_oracle": float(score.uses_oracle),
        "num_oracles": int(any(document.is_oracle for document in example.documents)),
        "sections": list(score.sections),
        "cited": list(score.cited),
    }


SUITES: dict[str, Callable[[Finished, Task], list[Record]]] = {
    "perplexity": perplexity,
    "answers": answers,
    "raft": raft,
}


def measure_lm_eval(
    arguments: argparse.Namespace, run: str, which: str, base: str | None, task: Task | None
) -> Result:
    """A task of EleutherAI's harness on the opened model."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        reason = "needs lm-eval, which is not installed"
        raise ConfigError("--suite", arguments.suite, reason, "pip install lm-eval") from None
    finished = open_finished(run, which, arguments.device, base)
    name = arguments.suite.removeprefix(LM_EVAL)
    harness = HFLM(
        pretrained=finished.model, tokenizer=finished.tokenizer, batch_size=arguments.batch_size
    )
    found = attempt(
        "--suite",
        arguments.suite,
        lambda: lm_eval.simple_evaluate(model=harness, tasks=[name], limit=arguments.limit),
    )
    metrics = {
        f"{part} {score.removesuffix(',none')}": value
        for part, scores in found["results"].items()  # of a group, one for each of its tasks
        for score, value in scores.items()
        if isinstance(value, float)
    }
    return Result(finished.which, metrics, [])


def compare(before: list[Record], after: list[Record]) -> dict[str, Comparison]:
    """Each score of two models on the same records, where its weights are the same, too.

    The loss of a token means something else to a model with other tokens; bits of a byte do not.
    Of fewer than :data:`LEAST_PAIRS` pairs nothing is said.
    """
    found: dict[str, Comparison] = {}
    earlier = {record["number"]: record for record in before}
    later = [record for record in after if record["number"] in earlier]
    paired = [earlier[record["number"]] for record in later]
    for name in score_names(later) if len(later) >= LEAST_PAIRS else []:
        weights = weights_of(later, name)
        if weights == weights_of(paired, name) and any(weights):
            values, others = ([record[name] for record in side] for side in (paired, later))
            found[name] = paired_bootstrap(values, others, weights)
    return found


def report_of(
    arguments: argparse.Namespace,
    task: Task | None,
    before: Result | None,
    after: Result,
    compared: dict[str, Comparison],
) -> dict[str, Any]:
    """All that was found, for a JSON file."""
    return {
        "run": arguments.run,
        "which": after.which,
        "suite": task.suite if task is not None else arguments.suite,
        "data": arguments.data or (task.corpus.name if task is not None else None),
        "num_records": len(after.records),
        "limit": arguments.limit,
        "metrics": after.metrics,
        "baseline": arguments.baseline,
        "baseline_which": before.which if before else None,
        "baseline_metrics": before.metrics if before else None,
        "comparison": {name: found._asdict() for name, found in compared.items()},
        "records": after.records,
        "baseline_records": before.records if before else None,
    }


def keep(report: dict[str, Any], arguments: argparse.Namespace, folder: RunFolder | None) -> None:
    """Write the report into the run's folder, and to ``--out``."""
    paths = [Path(arguments.out).expanduser()] if arguments.out else []
    if folder is not None:
        paths.append(folder.next_evaluation(report["suite"], report["which"]))
    for path in paths:
        write_json(path, report)
        print(f"written to {path}", file=sys.stderr)


def show(
    report: dict[str, Any], before: Result | None, after: Result, compared: dict[str, Comparison]
) -> None:
    """Print a table: each score, and with a baseline the difference and its 95 % interval."""
    from rich.console import Console
    from rich.table import Table

    names = ["before", "after", "difference", "95 % interval", "p"] if before else ["value"]
    data = f" on {report['data']}" if report["data"] else ""
    count = f", {report['num_records']} records" if report["num_records"] else ""
    table = Table(box=None, pad_edge=False)
    table.add_column("score", style="bold")
    for name in names:
        table.add_column(name, justify="right")
    for name, value in after.metrics.items():
        row = [f"{value:.4f}"]
        if before:
            row = [number(before.metrics.get(name)), *row, *interval(compared.get(name))]
        table.add_row(name, *row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{report['suite']}{data}{count}", highlight=False)
    console.print(table)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def interval(found: Comparison | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    p = f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001"
    return [f"{found.difference:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}", p]


if __name__ == "__main__":
    sys.exit(main())
