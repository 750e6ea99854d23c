"""Write with a finished model: a prompt, a chat, a file of prompts, a question to a RAFT model."""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.data.example import Evidence, Message
from llmtrain.data.formats import ROLES
from llmtrain.data.raft import Prompt, raft_messages, sections_of
from llmtrain.data.source.raft import Raft
from llmtrain.errors import ConfigError
from llmtrain.finished import Finished, command, config_of, open_finished, options_of
from llmtrain.folder import write_text
from llmtrain.held_out import examples_of
from llmtrain.writing import Answer, Ids, Sampling, Writer

EXAMPLES = """examples:
  python -m llmtrain.generate outputs/<run> --prompt "def "
  python -m llmtrain.generate outputs/<run> --chat
  python -m llmtrain.generate outputs/<run> --file prompts.jsonl --out answers.jsonl
  python -m llmtrain.generate Qwen/Qwen2.5-0.5B-Instruct --prompt "Why is the sky blue?"
"""
LIMITS = {
    "max_new_tokens": (1, None),
    "temperature": (0, None),
    "top_p": (0, 1),
    "top_k": (0, None),
    "repetition_penalty": (0.01, None),
    "seed": (0, 2**32 - 1),
    "batch_size": (1, None),
}


def main(words: list[str] | None = None) -> int:
    """Generate as the command line says, and return the exit code."""
    return command(generate, parser().parse_args(words))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = options_of("generate", __doc__, EXAMPLES)
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="a text to continue, or a question to answer")
    what.add_argument("--chat", action="store_true", help="talk; /reset forgets, /exit ends")
    what.add_argument("--file", help=".txt: a prompt a line; .jsonl or .json: prompt or messages")
    what.add_argument("--question", help="ask a RAFT model")
    what.add_argument("--sample", action="store_true", help="a held-out row of a RAFT run's data")
    options.add_argument("--raw", action="store_true", help="no chat template around a prompt")
    options.add_argument("--max-new-tokens", type=int, default=256)
    options.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest")
    options.add_argument("--top-p", type=float, default=0.9)
    options.add_argument("--top-k", type=int, default=0, help="0: no limit")
    options.add_argument("--repetition-penalty", type=float, default=1.0)
    options.add_argument("--stop", action="append", default=[], help="end before this text")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--batch-size", type=int, default=8, help="prompts of a file at once")
    options.add_argument("--out", help="the .jsonl file to write the answers of --file to")
    options.add_argument("--which", default="auto", choices=["auto", "final", "best"])
    return options


def generate(arguments: argparse.Namespace) -> None:
    """Do what was asked. Raises ConfigError for what cannot be done."""
    check(arguments)
    asked = list(read_prompts(arguments))  # refused before a model is opened
    opened = (arguments.run, arguments.which, arguments.device, arguments.base)
    finished = open_finished(*opened)
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    values = {name: getattr(arguments, name) for name in names}
    writer = Writer(finished, Sampling(**values, stop=tuple(arguments.stop)))
    import torch

    torch.manual_seed(arguments.seed)
    if arguments.chat:
        chat(writer)
    elif arguments.file:
        answer_all(writer, asked, arguments)
    else:
        answer_one(writer, asked[0], arguments.raw)


def check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a value that generation cannot use."""
    for name in ("prompt", "question", "file"):
        if getattr(arguments, name) == "":
            raise ConfigError(f"--{name}", "''", "is empty", "give at least one character")
    if "" in arguments.stop:
        raise ConfigError("--stop", "''", "is empty", "give at least one character")
    if arguments.out and not arguments.file:
        raise ConfigError("--out", arguments.out, "is for the answers of --file", "leave it out")
    for name, (low, high) in LIMITS.items():
        value = getattr(arguments, name)
        if not value >= low or (high is not None and value > high):  # a NaN is not >= anything
            reason = f"is not {low} or more" + (f" and {high} or less" if high is not None else "")
            raise ConfigError(f"--{name.replace('_', '-')}", value, reason, "give one that is")


@dataclass(frozen=True)
class Asked:
    """A text, or a dialogue that ends before the answer; of a RAFT row with its sections."""

    text: str = ""
    messages: tuple[Message, ...] = ()
    sections: tuple[str, ...] = ()

    def ids(self, writer: Writer, raw: bool) -> Ids:
        """The same as tokens. A model that was taught dialogues is asked in its template."""
        if self.messages:
            return writer.asked(self.messages)
        if raw or not converses(writer.finished):
            return writer.plain(self.text)
        return writer.asked([Message("user", self.text)])

    def row(self) -> dict[str, Any]:
        """The same as the fields of a row."""
        if self.messages:
            return {"messages": [message._asdict() for message in self.messages]}
        return {"prompt": self.text}


def converses(finished: Finished) -> bool:
    """Whether a model answers in a template: it has one, and its run, if any, taught it rows."""
    taught = finished.config is None or finished.config.data.has_masks
    return taught and finished.tokenizer.chat_template is not None


def read_prompts(arguments: argparse.Namespace) -> Iterator[Asked]:
    """What is asked, from the command line, a file, or the run's own data."""
    if arguments.prompt:
        yield Asked(arguments.prompt)
    elif arguments.question:
        yield raft_question(raft_of(arguments.run, "--question"), arguments.question)
    elif arguments.sample:
        yield raft_sample(raft_of(arguments.run, "--sample"), arguments.seed)
    elif arguments.file:
        yield from read_file(Path(arguments.file).expanduser(), arguments.run)


def read_file(path: Path, run: str) -> Iterator[Asked]:
    """The prompts of a file. Raises ConfigError for a row that asks nothing, with its place."""
    from llmtrain.data.rows import read_rows

    if not path.is_file():
        raise ConfigError("--file", path, "is no file", "give a .txt, .json, .jsonl or .parquet")
    if path.suffix == ".txt":
        found = [Asked(line) for line in text_of(path).splitlines() if line]
    else:
        found = [asked_of(row.values, row.place, run) for row in read_rows(str(path), fail)]
    if not found:
        raise ConfigError("--file", path, "holds no prompt", "write one a line")
    yield from found


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError("--file", path, "is not UTF-8", "convert it, with iconv say") from None


def fail(error: ConfigError) -> None:
    raise error


def asked_of(values: dict[str, Any], place: str, run: str) -> Asked:
    """One row as what is asked: a prompt, a dialogue without its answer, or a RAFT question."""
    prompt, turns, question = (values.get(name) for name in ("prompt", "messages", "question"))
    if isinstance(prompt, str) and prompt:
        return Asked(prompt)
    if isinstance(question, str) and question:
        return raft_question(raft_of(run, "--file"), question, documents_of(values, place))
    if isinstance(turns, list) and turns and all(map(is_turn, turns)):
        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        asked = messages[: -1 if messages[-1].role == "assistant" else None]
        if asked:
            return Asked(messages=asked)
    remedy = 'write {"prompt": ...}, {"messages": [...]} or, of a RAFT run, {"question": ...}'
    raise ConfigError("--file", f"{place}:", "asks nothing", remedy)


def is_turn(turn: Any) -> bool:
    fields = ("role", "content")
    is_text = isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in fields)
    return is_text and turn["role"] in ROLES


def documents_of(values: dict[str, Any], place: str) -> list[Evidence]:
    """The documents of a RAFT row in their order; which of them is the oracle need not be known."""
    items = values.get("documents") or []
    if not isinstance(items, list) or not all(
        isinstance(item, dict) and isinstance(item.get("content"), str) for item in items
    ):
        remedy = 'write "documents": [{"content": ...}]'
        raise ConfigError("--file", f"{place}:", "has a document without content", remedy)
    return [Evidence(item["content"], item.get("type") == "oracle") for item in items]


def raft_of(run: str, key: str) -> Raft:
    """The RAFT data of a run, whose prompt a question goes through."""
    config = config_of(run)
    if config is None or not isinstance(config.data, Raft):
        reason = "was not trained on RAFT rows, so that a question has no prompt"
        raise ConfigError("run", run, reason, f"take --prompt in place of {key}")
    return config.data


def raft_question(data: Raft, question: str, documents: Iterable[Evidence] = ()) -> Asked:
    messages = raft_messages(question, list(documents), data.prompt, data.sections)
    return Asked(messages=messages, sections=wanted_sections(data))


def raft_sample(data: Raft, seed: int) -> Asked:
    """A held-out row of a run's own data, chosen by seed."""
    chosen = random.Random(seed).choice(examples_of(data))
    return Asked(messages=chosen.messages[:-1], sections=wanted_sections(data))


def wanted_sections(data: Raft) -> tuple[str, ...]:
    prompt: Prompt = data.prompt
    return tuple(prompt.sections if data.sections is None else data.sections)


def answer_one(writer: Writer, asked: Asked, raw: bool) -> None:
    """Stream one answer, list its sections, and say the rate."""
    prompt = asked.ids(writer, raw)
    writer.room(len(prompt))  # refused before anything is printed
    if asked.messages:
        print(f"{asked.messages[-1].content}\n", flush=True)
    elif raw or not converses(writer.finished):
        print(asked.text, end="", flush=True)
    answer = stream(writer, prompt)
    if asked.sections:
        found = sections_of(answer.text, asked.sections)
        print("\nsections:")
        for heading in asked.sections:
            print(f"  {'found  ' if heading in found else 'missing'} {heading}")


def stream(writer: Writer, prompt: Ids) -> Answer:
    """Print an answer as it is written, and its rate to stderr."""
    start = time.perf_counter()
    answer = writer.stream(prompt)
    say_rate(answer.num_tokens, start)
    return answer


def say_rate(num_tokens: int, start: float) -> None:
    rate = num_tokens / (time.perf_counter() - start)
    print(f"{num_tokens} tokens, {rate:.1f} tok/s", file=sys.stderr)


def answer_all(writer: Writer, asked: list[Asked], arguments: argparse.Namespace) -> None:
    """Answer a file's prompts in batches, as one JSON row each."""
    prompts = [item.ids(writer, arguments.raw) for item in asked]
    for prompt in prompts:
        writer.room(len(prompt))
    start, num_tokens, lines = time.perf_counter(), 0, []
    answers = writer.write(prompts, arguments.batch_size)
    for item, answer in zip(asked, answers, strict=True):
        row = item.row() | {"answer": answer.text, "num_tokens": answer.num_tokens}
        if item.sections:
            row["sections"] = sections_of(answer.text, item.sections)
        lines.append(json.dumps(row, ensure_ascii=False))
        num_tokens += answer.num_tokens
        if not arguments.out:
            print(lines[-1], flush=True)
    if arguments.out:
        write_text(Path(arguments.out).expanduser(), "\n".join(lines) + "\n")
    say_rate(num_tokens, start)


def chat(writer: Writer) -> None:
    """Answer line after line, with all that was said before, until /exit or the end of input."""
    if writer.tokenizer.chat_template is None:
        print("note: the model has no chat template; a plain one is used", file=sys.stderr)
    history: list[Message] = []
    for line in said():
        if line == "/reset":
            history = []
            continue
        history.append(Message("user", line))
        history = without_oldest(writer, history)
        answer = stream(writer, writer.asked(history))
        history.append(Message("assistant", answer.text.strip()))


def said() -> Iterator[str]:
    """The lines that a user types or pipes, without empty ones."""
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(mark).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line


def without_oldest(writer: Writer, history: list[Message]) -> list[Message]:
    """The dialogue without its oldest turns, where all of it is too long for the model."""
    most = writer.finished.num_positions
    kept = history
    while most is not None and len(kept) > 1 and len(writer.asked(kept)) >= most:
        kept = kept[2:]
    if len(kept) < len(history):
        num_left_out = len(history) - len(kept)
        print(f"note: the oldest {num_left_out} turns no longer fit", file=sys.stderr)
    return kept


if __name__ == "__main__":
    sys.exit(main())
