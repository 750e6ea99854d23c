"""Questions about the interpreter's own library and language, answered from its documentation."""

import os
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmtrain.data.corpus import OnBad, digest
from llmtrain.data.example import Example
from llmtrain.data.raft import CITED
from llmtrain.data.rows import Row
from llmtrain.data.source.raft import Raft
from llmtrain.data.source.stdlib import modules
from llmtrain.data.source.stdlib_qa import (
    Described,
    check_embedded,
    described,
    library_fingerprint,
)
from llmtrain.errors import ConfigError

QUESTIONS = {
    "module": "What is the module {name} for?",
    "class": "What is the class {name}?",
    "function": "What does {name} do?",
    "topic": "What is said of the topic '{name}'?",
}
HEADINGS = ["Question", "Evidence", "Answer"]
NUM_DISTRACTORS = 2
LONGEST_DOCUMENT = 300  # characters
SHORTEST_SENTENCE, LONGEST_SENTENCE = 20, 140
BYTES_PER_SOURCE_BYTE = 0.24  # of the rows, measured on the library of Python 3.11
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z'])")


@dataclass
class StdlibRaft(Raft):
    """One row for each public name of the library whose docstring begins with a short sentence.

    Its oracle is that docstring, its distractors those of names of the same kind, where possible
    of the same module. The answer names what is asked about, quotes the sentence, and says it.
    """

    kind: str = "stdlib_raft"

    def check_source(self) -> None:
        check_embedded(self)
        headings = self.headings
        if len(headings) != len(HEADINGS):
            reason = f"are {len(headings)} headings and data=stdlib_raft answers under three"
            remedy = "set data.sections=null and leave data.prompt as it is"
            raise ConfigError("data.sections", ",".join(headings), reason, remedy)

    @property
    def headings(self) -> list[str]:
        return self.prompt.sections if self.sections is None else self.sections

    def examples(self, on_bad: OnBad) -> Iterator[Example]:
        return (self.example(row, "data") for row in raft_rows(self.headings, self.seed))

    def fingerprint(self) -> str:
        return digest([library_fingerprint(), LONGEST_DOCUMENT, super().fingerprint()])

    def num_bytes(self) -> int:
        return int(BYTES_PER_SOURCE_BYTE * sum(os.path.getsize(path) for path in modules()))


def raft_rows(headings: list[str], seed: int) -> Iterator[Row]:
    """Every row as it would stand in a file; the oracle is its first document."""
    found = {item.name: item for item in (*public(described()), *topics())}
    by_module, by_kind = defaultdict(list), defaultdict(list)
    for item in found.values():
        by_module[item.kind, item.module].append(item)
        by_kind[item.kind].append(item)
    for item in found.values():
        near = by_module[item.kind, item.module]
        pool = near if len(near) > NUM_DISTRACTORS else by_kind[item.kind]
        chosen = distractors(item, pool, seed)
        yield Row(row_of(item, chosen, headings), f"stdlib:{item.name}")


def distractors(item: Described, pool: list[Described], seed: int) -> list[Described]:
    chosen = random.Random(f"{seed}:{item.name}").sample(pool, NUM_DISTRACTORS + 1)
    return [other for other in chosen if other is not item][:NUM_DISTRACTORS]


def row_of(item: Described, others: Iterable[Described], headings: list[str]) -> dict[str, Any]:
    """A row in RAFT's format; the [1] of its answer is renumbered when documents are shuffled."""
    sentence = first_sentence(item.doc)
    parts = [item.name, f'[1] "{sentence}"', sentence]
    sections = zip(headings, parts, strict=True)
    documents = [document_of(item, "oracle")] + [document_of(o, "distractor") for o in others]
    return {
        "question": QUESTIONS[item.kind].format(name=item.name),
        "documents": documents,
        "teacher_answer": "\n".join(f"**{heading}**\n{part}" for heading, part in sections),
    }


def document_of(item: Described, type: str) -> dict[str, str]:
    return {"content": f"{item.name}: {shortened(item.doc)}", "type": type}


def public(items: Iterable[Described]) -> Iterator[Described]:
    """What one may use, and whose first sentence can be quoted and copied."""
    for item in items:
        is_public = not any(part.startswith(("_", "<")) for part in item.name.split("."))
        plain = Described(item.module, item.name, item.kind, item.doc.replace('"', "'"))
        if is_public and is_quotable(plain.doc):
            yield plain


def topics() -> Iterator[Described]:
    """The first paragraph of each topic of Python's help that can be quoted."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems ship Python without it
        return
    for name, text in sorted(topics.items()):
        paragraphs = (" ".join(part.replace('"', "'").split()) for part in text.split("\n\n"))
        prose = next(filter(is_quotable, paragraphs), None)
        if prose is not None:
            yield Described("topics", name, "topic", prose)


def is_quotable(doc: str) -> bool:
    sentence = first_sentence(doc)
    fits = SHORTEST_SENTENCE <= len(sentence) <= LONGEST_SENTENCE
    return fits and sentence.endswith(".") and not CITED.search(doc)


def first_sentence(text: str) -> str:
    return SENTENCE_END.split(text, maxsplit=1)[0]


def shortened(text: str) -> str:
    """As many whole sentences as fit into a document, and at least the first."""
    kept = first_sentence(text)
    for end in SENTENCE_END.finditer(text):
        if end.start() <= LONGEST_DOCUMENT:
            kept = text[: end.start()]
    return text if len(text) <= LONGEST_DOCUMENT else kept
