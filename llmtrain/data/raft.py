"""Answers from documents: how a RAFT row becomes a dialogue, and how its answer is scored.

RAFT (Zhang et al. 2024, https://arxiv.org/abs/2403.10131): a question is asked with the oracle
document that answers it and with distractors; for a share of the rows the oracle is left out.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from llmtrain.data.corpus import digest
from llmtrain.data.example import Evidence, Example, Message
from llmtrain.data.formats import text_of
from llmtrain.data.rows import BadRow, check_surrogates, standing_at
from llmtrain.errors import ConfigError

TYPES = {"oracle": True, "distractor": False}
PROMPT_FIELDS = {"user": {"documents", "question", "sections"}, "document": {"number", "content"}}
PROMPT_NEEDS = {"user": "question", "document": "content"}

# Signs that Chinese texts have a wide form of; each has one character, so that offsets stay.
NARROW = str.maketrans("：（）［］／，　", ":()[]/, ")
# [2] or [1, 3], and not the index of x[2]
CITED = re.compile(r"(?<![A-Za-z0-9_)])[\[【［](\d{1,3}(?:\s*[,，、]\s*\d{1,3})*)[\]】］]")
QUOTED = re.compile(
    r"##begin_quote##(.*?)##end_quote##|“([^“”]*)”|「([^「」]*)」|\"([^\"\n]*)\"", re.DOTALL
)
SHORTEST_QUOTE = 9  # characters; shorter ones are words set apart, not evidence

BEFORE_HEADING = (
    r"^[ \t#>*_【\[-]*(?:\(?(?:\d{1,2}|[一二三四五六七八九十]{1,3})[.、):])?[ \t*_【\[]*"
)
AFTER_HEADING = r"[ \t]*(?:[*_】\]:]+[ \t]*:?|$)[ \t]*"


@dataclass
class Prompt:
    """The texts of a RAFT prompt, a YAML of ``conf/prompt``.

    ``user`` has the fields {documents}, {question} and {sections} (the headings, one a line), and
    ``document`` has {number} and {content}. ``no_documents`` stands where there are none.
    """

    system: str = ""
    user: str = "???"
    document: str = "???"
    no_documents: str = ""
    sections: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise ConfigError for a text that cannot be filled in."""
        for name, known in PROMPT_FIELDS.items():
            check_fields(f"data.prompt.{name}", getattr(self, name), known, PROMPT_NEEDS[name])


def check_fields(key: str, text: str, known: set[str], needed: str) -> None:
    shown = ", ".join(f"{{{name}}}" for name in sorted(known))
    try:
        names = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except ValueError as error:
        remedy = f"use {shown}, and write other braces twice"
        raise ConfigError(key, shorten(text), f"cannot be filled in ({error})", remedy) from None
    if strangers := names - known:
        reason = f"has {{{min(strangers)}}}, which is no field of it"
        raise ConfigError(key, shorten(text), reason, f"use {shown}, and write other braces twice")
    if needed not in names:
        raise ConfigError(key, shorten(text), f"does not show {{{needed}}}", "add it")


def shorten(text: str) -> str:
    """A long text for an error of one line."""
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:40]}..."


def raft_messages(
    question: str,
    documents: Sequence[Evidence],
    prompt: Prompt,
    sections: Sequence[str] | None = None,
) -> tuple[Message, ...]:
    """What a model is asked: documents in this order, numbered from 1, and the headings wanted.

    ``sections`` take the place of the prompt's own.
    """
    shown = [
        prompt.document.format(number=number, content=document.content)
        for number, document in enumerate(documents, start=1)
    ]
    user = prompt.user.format(
        documents="\n".join(shown) or prompt.no_documents,
        question=question,
        sections="\n".join(prompt.sections if sections is None else sections),
    )
    system = (Message("system", prompt.system),) if prompt.system.strip() else ()
    return (*system, Message("user", user))


@dataclass(frozen=True)
class RaftWriter:
    """How rows become examples: the prompt, and by seed the order and the missing oracles."""

    prompt: Prompt
    sections: Sequence[str] | None = None
    drop_oracle_fraction: float = 0.0
    seed: int = 0

    def example(self, values: dict[str, Any], place: str, key: str = "data.path") -> Example:
        """A row as an example, whose id is a hash of the question: its rows are held out together.

        A number cited in the answer ([2]) means the row's second document: it is rewritten to the
        number that this document is shown with, and left out with it. Raises ConfigError, naming
        the place, for a row without question, answer or oracle.
        """
        with standing_at(place, key):
            question, answer = filled(values, "question"), filled(values, answer_field(values))
            given = documents_of(values.get("documents"))
        order = self.order(given, digest([question, *(item.content for item in given), answer]))
        documents = tuple(given[index] for index in order)
        shown = {index + 1: number for number, index in enumerate(order, start=1)}
        reference = renumbered(answer, shown, len(given))
        asked = raft_messages(question, documents, self.prompt, self.sections)
        return Example(
            digest([question]),
            place,
            messages=(*asked, Message("assistant", reference)),
            question=question,
            documents=documents,
            reference=reference,
        )

    def order(self, given: Sequence[Evidence], row_hash: str) -> list[int]:
        """The indices of the documents that are shown, in their order."""
        chance = random.Random(f"{self.seed}:{row_hash}")
        drops_oracle = chance.random() < self.drop_oracle_fraction
        order = chance.sample(range(len(given)), len(given))
        others = [index for index in order if not given[index].is_oracle]
        return others if drops_oracle and others else order


def answer_field(values: dict[str, Any]) -> str:
    return "answer" if "teacher_answer" not in values and "answer" in values else "teacher_answer"


def documents_of(items: Any) -> list[Evidence]:
    """The documents of a row; BadRow unless one of them is an oracle."""
    if not isinstance(items, list):
        raise BadRow("has no list of documents")
    documents = [document_of(item, number) for number, item in enumerate(items, start=1)]
    if not any(document.is_oracle for document in documents):
        raise BadRow("has no oracle document")
    return documents


def document_of(item: Any, number: int) -> Evidence:
    if not isinstance(item, dict):
        raise BadRow(f"has {type(item).__name__} and not an object as document {number}")
    role = item.get("type")
    if not isinstance(role, str) or role not in TYPES:
        raise BadRow(f"has type {role!r} in document {number}", "give oracle or distractor")
    return Evidence(filled(item, "content", f" in document {number}"), TYPES[role])


def filled(values: dict[str, Any], field: str, where: str = "") -> str:
    """The text of a field; BadRow where it is missing, empty or no text."""
    text = text_of(values, field)
    if not text.strip():
        raise BadRow(f"has an empty {field}{where}")
    check_surrogates(text)
    return text


def renumbered(answer: str, shown: dict[int, int], num_given: int) -> str:
    """The answer with its citations as the documents are shown; quoted text stays as it is."""
    pieces, end = [], 0
    for quote in QUOTED.finditer(answer):
        pieces += [renumber(answer[end : quote.start()], shown, num_given), quote.group()]
        end = quote.end()
    return "".join([*pieces, renumber(answer[end:], shown, num_given)])


def renumber(text: str, shown: dict[int, int], num_given: int) -> str:
    def replace(match: re.Match[str]) -> str:
        cited = [int(number) for number in re.findall(r"\d+", match[1])]
        if not all(1 <= number <= num_given for number in cited):
            return match[0]
        return "".join(f"[{shown[number]}]" for number in cited if number in shown)

    return CITED.sub(replace, text)


@dataclass(frozen=True)
class RaftScore:
    """What an answer holds: headings, quotes and citations; shares are between 0 and 1."""

    sections: tuple[str, ...]
    section_share: float
    num_quotes: int
    quote_share: float
    cited: tuple[int, ...]
    uses_oracle: bool


def score_answer(answer: str, example: Example, sections: Sequence[str]) -> RaftScore:
    """Which headings an answer has, and whether its evidence lies in the documents it was given.

    ``quote_share`` is that of the quotes found in a document, white space aside, and 0 without any
    quote; ``cited`` are the numbers of documents that exist. The oracle is used where a quote lies
    in one or its number is cited.
    """
    present = tuple(sections_of(answer, sections))
    quotes = quotes_in(answer)
    contents = [squeezed(document.content) for document in example.documents]
    found = [quote for quote in quotes if any(quote in content for content in contents)]
    cited = tuple(number for number in citations_in(answer) if 1 <= number <= len(contents))
    oracles = [number for number, item in enumerate(example.documents, start=1) if item.is_oracle]
    return RaftScore(
        sections=present,
        section_share=share(len(present), len(sections)),
        num_quotes=len(quotes),
        quote_share=share(len(found), len(quotes)),
        cited=cited,
        uses_oracle=any(
            number in cited or any(quote in contents[number - 1] for quote in found)
            for number in oracles
        ),
    )


def share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def quotes_in(answer: str) -> list[str]:
    """The quotes of an answer, without white space; single words that are set apart left out."""
    quotes = ["".join(group or "" for group in match) for match in QUOTED.findall(answer)]
    return [squeezed(quote) for quote in quotes if len(quote.strip()) >= SHORTEST_QUOTE]


def citations_in(answer: str) -> list[int]:
    """The document numbers cited, each once, in ascending order."""
    cited = CITED.findall(answer)
    return sorted({int(number) for group in cited for number in re.findall(r"\d+", group)})


def squeezed(text: str) -> str:
    return "".join(text.split())


def sections_of(answer: str, sections: Sequence[str]) -> dict[str, str]:
    """The text below each heading that stands at the start of a line, in the answer's order.

    A heading may be plain on a line of its own, or as ``**H**``, ``## H``, ``【H】``, ``1. H:``;
    wide signs equal narrow ones. Of a heading that comes twice the first counts.
    """
    if not sections:
        return {}
    found = list(heading_pattern(sections).finditer(answer.translate(NARROW)))
    edges = [*(match.start() for match in found), len(answer)]
    texts: dict[str, str] = {}
    for match, end in zip(found, edges[1:], strict=True):
        heading = sections[(match.lastindex or 0) - 1]
        texts.setdefault(heading, answer[match.end() : end].strip())
    return texts


def heading_pattern(sections: Sequence[str]) -> re.Pattern[str]:
    """One group for each heading, whatever white space is in it."""
    spelled = "|".join(f"({spelling(heading)})" for heading in sections)
    return re.compile(f"{BEFORE_HEADING}(?:{spelled}){AFTER_HEADING}", re.M | re.I)


def spelling(heading: str) -> str:
    return r"[ \t]*".join(map(re.escape, squeezed(heading.translate(NARROW))))
