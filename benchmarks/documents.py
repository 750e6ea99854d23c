"""Every command of the README and the guides, run as it stands there, by a newcomer to a clone.

    python -m benchmarks.documents [PAGE ...]

A clone gets the files and the finished runs that the guides speak of. Then each line of a shell
block that is ours is typed there, with few changes: `<run>` and its like become what was
prepared, what trains takes two small steps, and what needs a GPU, a queue or a second machine, or
would shut this one down, is rehearsed (`launcher=dry`, `launcher.submit=false`). Runs get seeds
and exports places of their own, so that none is done already. Nothing is fetched
or sent: the hub and trackers are offline. A command ends well, or is refused in one line for what
this machine lacks; a traceback never counts. Writes results/<date>-<machine>/documents.md, and
exits 1 if any command failed.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from llmtrain.data.source.stdlib import sources
from llmtrain.errors import DONE, REFUSED
from llmtrain.folder import write_text
from llmtrain.hardware import cpu_name

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"(?:python -m llmtrain[.]|llmtrain )([a-z]+) ?(.*)", re.DOTALL)
PLACES = {
    "<run>": "some-0123abcd",
    "<sweep>": "some_sweep",
    "<step>": "10",
    "<name>": "none",
    "...": "somewhere",
}
LONGEST_SECONDS = 400
STEPS = ["train.max_steps=2", "train.global_batch=2", "train.seq_len=128", "train.eval_batches=1"]
TINY = ["model=llama_tiny", "model.config.num_hidden_layers=2", "hardware=cpux1"]
LARGE = (
    "_1b",
    "_7b",
    "_50m",
    "_350m",
    "hardware=",
    "on_finish.",
    "model.path=Qwen",
    "data=wikitext",
)
WATCHED_SECONDS = 8.0
MISTYPED = ("usage:", "is no key", "is no choice", "does not exist")  # no lack of a machine
MIGRATED = {  # the guide's names, and examples of that kind
    "qwen3_lora_sft.yaml": "factory_lora.yaml",
    "lora-1b.yml": "axolotl_lora.yml",
    "ds_z3_offload.json": "zero3_offload.json",
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, after so many seconds, and the last line that it said."""

    page: str
    typed: list[str]
    code: int
    seconds: float
    said: str
    has_traceback: bool

    @property
    def is_well(self) -> bool:
        is_mistyped = self.code == REFUSED and any(words in self.said for words in MISTYPED)
        return self.code in (DONE, REFUSED) and not self.has_traceback and not is_mistyped


def main() -> int:
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="README.md, data.md, ...")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    # A shell that starts this in the background has it and all below it ignore Ctrl+C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:
        clone = prepared(Path(scratch))
        outcomes = list(typed(clone, options.pages))
    text = page(outcomes)
    write_text(options.out / f"{date.today()}-{platform.machine()}" / "documents.md", text)
    print(text)
    return DONE if all(outcome.is_well for outcome in outcomes) else 1


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """The command and the words of each line of a page's shell blocks that begins with ours."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if found := COMMAND.match(line.strip()):
                yield found[1], found[2]


def words_of(text: str) -> list[str]:
    """The words of a shell line, without its comment and with something in each place."""
    for place, value in PLACES.items():
        text = text.replace(place, value)
    return shlex.split(re.sub(r"<[^>]*>", "something", text), comments=True)


def prepared(scratch: Path) -> Path:
    """A clone with what the guides take for granted."""
    clone = scratch / "llmtrain"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    (clone / "elsewhere").mkdir()
    for folder in ("my_texts", "web"):
        (clone / folder).mkdir()
        for number, (_, source) in zip(range(40), sources(), strict=False):
            (clone / folder / f"{number}.txt").write_bytes(source)
    for guide, example in MIGRATED.items():
        shutil.copy(ROOT / "tests" / "migrate" / "files" / example, clone / guide)
    arguments = {"per_device_train_batch_size": 2, "learning_rate": 1e-4, "max_steps": 10}
    arguments |= {"output_dir": "out", "gradient_accumulation_steps": 1, "optim": "adamw_torch"}
    (clone / "training_args.json").write_text(json.dumps(arguments))
    (clone / "prompts.jsonl").write_text('{"prompt": "def main("}\n')
    rows = [{"question": "What is it?", "documents": [{"content": "It is a module."}]}]
    (clone / "raft.json").write_text(json.dumps(rows))
    perform(clone, ["data", "sample", "messages", "--out", "mine.jsonl"])
    perform(clone, ["data", "sample", "raft", "--out", "raft_dataset.json"])
    perform(clone, ["run", *TINY, *STEPS, "name=plain"])
    learned = ["model=pretrained", f"model.path={next(clone.glob('outputs/plain*'))}/final"]
    learned += [*STEPS[:2], "hardware=cpux1"]
    perform(clone, ["run", "mode=distill", "data=stdlib_raft", *learned, "name=raft"])
    tuned = ["mode=sft", "data=stdlib_qa", "adapter=lora", *learned, "name=tuned"]
    perform(clone, ["run", *tuned])
    swept = ["optimizer.lr=1e-3,2e-3", "sweep.name=swept"]
    perform(clone, ["run", "-m", *TINY, *STEPS, *swept])
    return clone


def perform(clone: Path, words: list[str]) -> None:
    """A command of the preparation, which has to end well."""
    ended = execute(clone, words)
    print(f"prepared: {' '.join(words)} ({ended.seconds:.0f} s)", flush=True)
    if ended.code != DONE:
        sys.exit(ended.said)


def typed(clone: Path, pages: list[str]) -> Iterator[Outcome]:
    """Each command once, where it stands first."""
    seen = set()
    for document in PAGES:
        if pages and document.name not in pages:
            continue
        for name, text in commands(document):
            words = adapted(clone, [name, *words_of(marked(text))])
            if tuple(words) in seen:
                continue
            seen.add(tuple(words))
            outcome = execute(clone, words, document.name)
            said = "well" if outcome.is_well else "BADLY"
            line = f"{document.name}: {' '.join(words)}: {outcome.code}, {said}"
            print(f"{line}, {outcome.seconds:.0f} s, {outcome.said}", flush=True)
            yield outcome


def marked(text: str) -> str:
    """The line with `<run>` and its like by names that a shell would not read."""
    for place in ("run", "sweep", "other"):
        text = text.replace(f"<{place}>", f"@{place}@")
    return text


def adapted(clone: Path, words: list[str]) -> list[str]:
    """The words with what was prepared in their places, and small enough for this machine."""
    asks_raft = "--question" in words or "raft.json" in words
    name = "tuned" if words[0] == "export" else "raft" if asks_raft else "plain"
    run = next(clone.glob(f"outputs/{name}*"))
    final = next(clone.glob("outputs/plain*")) / "final"
    sweep = next(clone.glob("outputs/swept*"))
    other = next(clone.glob("outputs/llama_tiny_stdlib*")).relative_to(clone)
    places = {"@run@": run.name, "@sweep@": sweep.name, "outputs/@other@": str(other)}
    places["path=somewhere"] = f"path={final}"
    for place, value in places.items():
        words = [word.replace(place, value) for word in words]
    words = [
        str(clone / "elsewhere") if word in ("/data", "/data/skypile") else word for word in words
    ]
    if words[0] == "node":
        alone = {"--num-nodes 2": "--num-nodes 1", "node1:": "localhost:"}
        line = " ".join(words)
        for told, here in alone.items():
            line = line.replace(told, here)
        return line.split()
    if words[0] == "export" and "--out" not in words:  # the same run's may be there already
        return [*words, "--out", f"exported_{zlib.crc32(' '.join(words).encode())}"]
    if words[0] != "run":
        return words
    return [*words, *smaller(words), *of_its_own(words)]


def of_its_own(words: list[str]) -> list[str]:
    """What makes a run another than those of other lines, which would be done already."""
    is_one = "-m" not in words and not any(word.startswith("launcher=") for word in words)
    return [f"seed={zlib.crc32(' '.join(words).encode())}"] if is_one else []


def smaller(words: list[str]) -> list[str]:
    """What makes a run that this machine can do in seconds, or rehearses it."""
    if "launcher=slurm" in words:
        return ["launcher.submit=false"]
    if any(mark in word for word in words for mark in LARGE):
        return ["launcher=dry"]
    trials = ["sweep.num_trials=4"] if any(word.startswith("sweep=") for word in words) else []
    is_named = any(word.startswith(("model=", "sweep=", "mode=")) for word in words)
    answers = ["train.seq_len=512"] if "data=raft" in words else []  # which follow documents
    return [*STEPS, *answers, *trials, *([] if is_named else TINY)]


def execute(clone: Path, words: list[str], document: str = "") -> Outcome:
    """Run a command in the clone until it ends; one that watches until it is interrupted."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", f"llmtrain.{words[0]}", *words[1:]],
        cwd=clone,
        env=os.environ | offline(clone.parent),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(
            timeout=WATCHED_SECONDS if "--watch" in words else LONGEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    finally:
        process.kill()
    seconds = time.perf_counter() - begun
    code = DONE if "--watch" in words and process.returncode == 130 else process.returncode
    lines = (err if code else out).strip().splitlines() or [""]
    place = str(clone.parent)  # this machine's, and gone afterwards
    said = lines[-1].strip().replace(place, "..")[:200]
    shown = [word.replace(place, "..") for word in words]
    return Outcome(document, shown, code, seconds, said, "Traceback" in err)


def offline(scratch: Path) -> dict[str, str]:
    """Caches of their own, and neither a hub nor a tracker's server."""
    told = {"HF_HOME": str(scratch / "hub"), "LLMTRAIN_CACHE": str(scratch / "cache")}
    return told | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def page(outcomes: list[Outcome]) -> str:
    """A row for each command."""
    well = [outcome for outcome in outcomes if outcome.is_well]
    ran = sum(outcome.code == DONE for outcome in well)
    lines = [f"# The guides' commands: {cpu_name()}, {date.today()}", ""]
    lines += ["`python -m benchmarks.documents`", ""]
    lines += [
        f"Of {len(outcomes)} commands {ran} ended well, {len(well) - ran} were refused for what"
    ]
    lines += [f"this machine lacks, {len(outcomes) - len(well)} failed.", ""]
    lines += ["| page | command | exit code | what a refusal says |", "|---|---|--:|---|"]
    for each in outcomes:
        command = " ".join(each.typed).replace("|", "\\|")
        said = "" if each.code == DONE else each.said.replace("|", "\\|")
        lines.append(f"| {each.page} | `{command}` | {each.code} | {said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
