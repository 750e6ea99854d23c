"""Dialogues as text: the tokenizer's own chat template or a named one, and what of it is learned.

Learned ranges come from rendering the dialogue as far as each answer's beginning and end. What is
rendered for an answer's beginning is what the model is asked with later, to the letter.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.data.example import Example, LossOn, Message
from llmtrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED = Path(__file__).parent / "templates"
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
MARKS = {"chatml": "<|im_end|>"}  # the token that ends a turn, where a named template has its own

PROBE = "an answer"
# Some templates write today's date into every text; a run must not depend on its day.
DAY = date(2024, 7, 26)
DATE = {"date_string": DAY.strftime("%d %b %Y"), "strftime_now": DAY.strftime}

Span = tuple[int, int]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template in transformers' form, and the special tokens that it may name.

    ``start`` is what the tokenizer itself begins a text with, and ``added`` its added tokens, by
    which the end of an answer is told from white space behind it.
    """

    source: str
    tokens: dict[str, str]
    start: str = ""
    added: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message], asks: bool = False) -> str:
        """The text of a dialogue; ``asks`` ends it where an answer of the assistant begins."""
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [message._asdict() for message in messages]
        options: dict[str, Any] = {"add_generation_prompt": asks, **DATE, **self.tokens}
        rendered: Any = render_jinja_template([turns], chat_template=self.source, **options)
        return str(rendered[0][0])

    def rendered(self, example: Example, loss_on: LossOn) -> tuple[str, tuple[Span, ...]]:
        """An example's text and the character ranges of it that are learned.

        Raises ConfigError, naming the example's place, where the template does not tell them.
        """
        if not example.messages:
            return self.plain(example, loss_on)
        text = self.safely(example, example.messages)
        if loss_on is LossOn.all:
            return text, ((0, len(text)),)
        answers = [
            number for number, message in enumerate(example.messages) if message.role == "assistant"
        ]
        chosen = answers[-1:] if loss_on is LossOn.last else answers
        spans = tuple(self.span(example, text, number) for number in chosen)
        if sum(stop - start for start, stop in spans) in (0, len(text)):
            reason = "marks nothing or everything of a dialogue as the assistant's"
            raise bad_template(example, reason)
        return text, spans

    def span(self, example: Example, text: str, number: int) -> Span:
        """Where the answer that is message ``number`` lies in the rendered text, with its end."""
        before = self.safely(example, example.messages[:number], asks=True)
        through = self.safely(example, example.messages[: number + 1])
        if not (text.startswith(before) and text.startswith(through)):
            if number == len(example.messages) - 1:
                raise bad_template(example, "writes the last answer unlike what is asked with")
            raise ConfigError(
                "data.loss_on",
                "assistant",
                f"cannot be found: at {example.place} the chat template rewrites earlier turns",
                "set data.loss_on=last",
            )
        end = through.rstrip()  # a model stops at its end token and never writes the line break
        stop = len(end) if end.endswith(self.added) else len(through)
        return len(before), max(stop, len(before))

    def plain(self, example: Example, loss_on: LossOn) -> tuple[str, tuple[Span, ...]]:
        """A prompt and its completion as they stand, ended by the end-of-sequence token."""
        prompt = self.prompt(example)
        text = prompt + example.completion + self.tokens["eos_token"]
        return text, ((0 if loss_on is LossOn.all else len(prompt), len(text)),)

    def prompt(self, example: Example) -> str:
        """What a model is asked with for an example's last answer."""
        if not example.messages:
            return self.start + example.prompt
        return self.safely(example, example.messages[:-1], asks=True)

    def end(self) -> str | None:
        """The added token that it puts behind an answer; None where it puts other text there."""
        dialogue = (Message("user", "question"), Message("assistant", PROBE))
        try:
            behind = self.render(dialogue).rpartition(PROBE)[2]
        except Exception:  # it may refuse this dialogue, and not those of the data
            return None
        return next((token for token in self.added if behind.startswith(token)), None)

    def safely(self, example: Example, messages: Sequence[Message], asks: bool = False) -> str:
        try:
            return self.render(messages, asks)
        except Exception as error:  # a template is a program; some refuse roles or their order
            raise bad_template(example, f"refuses it: {' '.join(str(error).split())}") from None


def bad_template(example: Example, reason: str) -> ConfigError:
    remedy = "correct that row, or take another: data.template=plain"
    return ConfigError("data.path", f"{example.place}:", f"the chat template {reason}", remedy)


def open_template(tokenizer: Path, name: str | None) -> ChatTemplate:
    """The template called ``name`` for a tokenizer's folder; by default its own, else ``plain``.

    ``name`` is one of the shipped ones or the path of a .jinja file.
    """
    from llmtrain.data.tokenizer import load

    loaded = load(tokenizer)
    if name in MARKS:
        check_mark(loaded, name)
    source = own_template(tokenizer) if name is None else named(name)
    return template_for(loaded, source, special_tokens(tokenizer))


def template_for(
    tokenizer: "Tokenizer", source: str | None, tokens: dict[str, str]
) -> ChatTemplate:
    """A template as a tokenizer uses it; ``plain`` where there is none."""
    added = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())
    return ChatTemplate(
        named("plain") if source is None else source, tokens, start_of(tokenizer), added
    )


def end_ids(tokenizer: Path, source: str | None) -> list[int]:
    """The tokens that end an answer: the end of a sequence, and what a template ends turns by."""
    from llmtrain.data.tokenizer import load

    loaded, tokens = load(tokenizer), special_tokens(tokenizer)
    ends = {tokens["eos_token"], template_for(loaded, source, tokens).end()}
    ids = {loaded.token_to_id(end) for end in ends if end is not None}
    return sorted(found for found in ids if found is not None)


def start_of(tokenizer: "Tokenizer") -> str:
    """The special tokens that a tokenizer begins a text with, such as ``<s>``; empty for most."""
    encoding = tokenizer.encode("a")
    num_special = encoding.special_tokens_mask.index(0)
    return "".join(encoding.tokens[:num_special])


def check_template(name: str | None) -> None:
    """Raise ConfigError for a name that is neither shipped nor a file."""
    if name is not None:
        named(name)


def named(name: str) -> str:
    """The source of a shipped template or of a file."""
    known = {path.stem: path for path in NAMED.glob("*.jinja")}
    path = known.get(name, Path(name).expanduser())
    if not path.is_file():
        remedy = f"{nearest(name, known)}, or give the path of a .jinja file"
        raise ConfigError("data.template", name, "is no chat template", remedy)
    return path.read_text(encoding="utf-8")


def own_template(tokenizer: Path) -> str | None:
    """The chat template that a tokenizer's folder brings."""
    file = tokenizer / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings(tokenizer).get("chat_template")
    if isinstance(found, list):  # several by name, as older tokenizers have
        found = {item["name"]: item["template"] for item in found}.get("default")
    return found


def special_tokens(tokenizer: Path) -> dict[str, str]:
    """Special tokens by the names that templates know."""
    found = {name: settings(tokenizer).get(name) for name in SPECIAL_TOKENS}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in found.items()
        if token is not None
    }


def settings(tokenizer: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(
        (tokenizer / "tokenizer_config.json").read_text(encoding="utf-8")
    )
    return values


def check_mark(tokenizer: "Tokenizer", name: str) -> None:
    """Raise ConfigError where a template ends turns by a token that the tokenizer does not have."""
    if tokenizer.token_to_id(MARKS[name]) is None:
        reason = f"ends turns by {MARKS[name]}, which the tokenizer does not have"
        raise ConfigError("data.template", name, reason, "take data.template=plain")
