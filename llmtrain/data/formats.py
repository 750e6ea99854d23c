"""The formats that examples come in, each recognised by a row's content."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from llmtrain.data.corpus import digest
from llmtrain.data.example import Example, Message
from llmtrain.data.rows import BadRow, check_surrogates, standing_at

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

Values = dict[str, Any]


class Format(NamedTuple):
    """``field`` is the one it is known by, ``fields`` how its rows look, for people."""

    name: str
    field: str
    fields: str
    read: Callable[[Values], Example]


def to_example(values: Values, place: str, key: str = "data.path") -> Example:
    """A row of any known format as an example, whose ``id`` is a hash of what it says.

    Raises ConfigError (``key=place: reason; remedy.``) for a row that teaches no answer.
    """
    present = without_nulls(values)
    with standing_at(place, key):
        form = find_format(present)
        if form is None:
            found = ", ".join(present) or "no field"
            raise BadRow(f"has {found}", f"known are {'; '.join(form.fields for form in FORMATS)}")
        return identified(form.read(present), place)


def format_of_row(values: Values) -> str:
    """The name of a row's format, or ``unknown``."""
    form = find_format(without_nulls(values))
    return "unknown" if form is None else form.name


def without_nulls(values: Values) -> Values:
    """A table gives every row all fields, and null for those that the row has not."""
    return {name: value for name, value in values.items() if value is not None}


def find_format(values: Values) -> Format | None:
    """The first format whose field is there; ``conversations`` is told by its first turn."""
    name = next((form.name for form in FORMATS if form.field in values), None)
    if name == "sharegpt" and has_roles(values["conversations"]):
        name = "messages"
    return next((form for form in FORMATS if form.name == name), None)


def has_roles(turns: Any) -> bool:
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and "role" in turn for turn in turns
    )


def identified(example: Example, place: str) -> Example:
    """The example with its place and the id that its texts give it."""
    texts = [text for message in example.messages for text in message]
    texts += [example.prompt, example.completion]
    for text in texts:
        check_surrogates(text)
    return Example(digest(texts), place, example.messages, example.prompt, example.completion)


def read_raft(values: Values) -> Example:
    raise BadRow("is a RAFT row", "say data=raft")


def read_messages(values: Values) -> Example:
    turns = values["messages"] if "messages" in values else values["conversations"]
    return dialogue(turns_of(turns, "role", "content"))


def read_sharegpt(values: Values) -> Example:
    turns = turns_of(values["conversations"], "from", "value")
    return dialogue([*system_turn(values), *turns])


def read_alpaca(values: Values) -> Example:
    """``history`` holds the earlier turns as [question, answer], as LLaMA-Factory has it."""
    question = [text_of(values, "instruction"), text_of(values, "input", "")]
    turns = earlier_turns(values.get("history", []))
    asked = "\n\n".join(part for part in question if part.strip())
    return dialogue([*system_turn(values), *turns, *exchange(asked, text_of(values, "output"))])


def read_prompt(values: Values) -> Example:
    """Texts as they stand, as TRL has it, or the two parts of a list of messages."""
    prompt, completion = values["prompt"], values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return dialogue(turns_of([*prompt, *completion], "role", "content"))
    return plain(text_of(values, "prompt"), text_of(values, "completion"), "completion")


def read_query(values: Values) -> Example:
    return dialogue(exchange(text_of(values, "query"), text_of(values, "response")))


def read_question(values: Values) -> Example:
    return dialogue(exchange(text_of(values, "question"), text_of(values, "answer")))


def read_text(values: Values) -> Example:
    return plain("", text_of(values, "text"), "text")


FORMATS = (  # the first whose field is there is taken: many data sets keep a rendered `text` too
    Format("raft", "documents", "question, documents, teacher_answer (data=raft)", read_raft),
    Format("messages", "messages", "messages [role, content]", read_messages),
    Format("sharegpt", "conversations", "conversations [from, value]", read_sharegpt),
    Format("alpaca", "instruction", "instruction, input, output", read_alpaca),
    Format("prompt", "prompt", "prompt, completion", read_prompt),
    Format("query", "query", "query, response", read_query),
    Format("question", "question", "question, answer", read_question),
    Format("text", "text", "text", read_text),
)


def plain(prompt: str, completion: str, field: str) -> Example:
    if not completion.strip():
        raise BadRow(f"has an empty {field}")
    return Example("", "", prompt=prompt, completion=completion)


def exchange(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


def earlier_turns(history: Any) -> list[Message]:
    pairs = history if isinstance(history, list) else [history]
    for pair in pairs:
        is_pair = isinstance(pair, list) and [type(text) for text in pair] == [str, str]
        if not is_pair:
            raise BadRow("has a history that is no list of [question, answer]")
    return [message for pair in pairs for message in exchange(*pair)]


def system_turn(values: Values) -> list[Message]:
    system = text_of(values, "system", "")
    return [Message("system", system)] if system.strip() else []


def turns_of(turns: Any, role_field: str, text_field: str) -> list[Message]:
    """A list of turns as messages; each is named by its number in what is refused."""
    if not isinstance(turns, list):
        raise BadRow(f"has {type(turns).__name__} and not a list of turns")
    return [
        turn_of(turn, role_field, text_field, number) for number, turn in enumerate(turns, start=1)
    ]


def turn_of(turn: Any, role_field: str, text_field: str, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"has {type(turn).__name__} and not an object as turn {number}")
    role = turn.get(role_field)
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"has {role_field} {role!r} in turn {number}", f"known are {', '.join(ROLES)}")
    content = turn.get(text_field)
    if isinstance(content, list):
        content = "".join(map(part_text, content))
    if not isinstance(content, str):
        raise BadRow(f"has {kind(content)} and not text as {text_field} of turn {number}")
    return Message(ROLES[role], content)


def part_text(part: Any) -> str:
    """The text of ``{"type": "text", "text": ...}``."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        shown = part.get("type") if isinstance(part, dict) else kind(part)
        raise BadRow(f"has a part of type {shown}, and only text is learned")
    return str(part["text"])


def dialogue(messages: Iterable[Message]) -> Example:
    """An example of these turns; BadRow where they do not lead to an answer."""
    turns = tuple(messages)
    for number, turn in enumerate(turns, start=1):
        if turn.role in ("user", "assistant") and not turn.content.strip():
            name = "answer" if turn.role == "assistant" else "question"
            raise BadRow(f"has an empty {name} (turn {number})")
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise BadRow("has no turn of the assistant")
    if roles[-1] != "assistant":
        raise BadRow(f"ends with a turn of the {roles[-1]} and not with an answer")
    for number, pair in enumerate(pairwise(roles), start=1):
        if pair == ("user", "user"):
            raise BadRow(f"has two user turns running (turns {number} and {number + 1})")
    return Example("", "", messages=turns)


def text_of(values: Values, field: str, default: str | None = None) -> str:
    """The text of a field; BadRow where it is missing without a default, or is no text."""
    value = values.get(field, default)
    if value is None:
        raise BadRow(f"has no {field}")
    if not isinstance(value, str):
        raise BadRow(f"has {kind(value)} and not text as {field}")
    return value


def kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
