"""One row that teaches an answer, whatever format it came in."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Message(NamedTuple):
    """One turn; ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Evidence:
    """A document that an answer may rest on; an oracle holds what answers the question."""

    content: str
    is_oracle: bool


@dataclass(frozen=True)
class Example:
    """One row: a dialogue for the chat template, or a prompt and its completion as they stand.

    ``id`` is a hash of the content and decides whether the row is held out; ``place`` says where
    it was read (``file:line``). Without ``messages`` it is plain text: ``prompt`` is read and
    ``completion`` learned. A RAFT row keeps its ``question``, the ``documents`` in the order in
    which its prompt shows them, and its ``reference`` answer.
    """

    id: str
    place: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    question: str = ""
    documents: tuple[Evidence, ...] = ()
    reference: str = ""


class LossOn(Enum):
    """Which tokens of a dialogue are learned: every answer, the last one, or all there is."""

    assistant = "assistant"
    last = "last"
    all = "all"
