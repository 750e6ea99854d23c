"""What a finished model writes: prompts as it was taught them, batches, and answers that end."""

# B batch, L length

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.data.example import Message
from llmtrain.data.template import ChatTemplate, template_for
from llmtrain.errors import ConfigError
from llmtrain.finished import Finished

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "probe"  # an answer whose end in a rendered dialogue is looked for

Ids = list[int]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; a temperature of 0 takes the likeliest, a ``top_k`` of 0 bounds none.

    An answer ends before the first of the ``stop`` strings.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """The same as keyword arguments of transformers' ``generate``."""
        values: dict[str, Any] = {"repetition_penalty": self.repetition_penalty}
        if self.temperature > 0:
            names = ("temperature", "top_p", "top_k")
            values |= {name: getattr(self, name) for name in names}
        stop = {"stop_strings": list(self.stop)} if self.stop else {}
        return {"do_sample": self.temperature > 0, "num_beams": 1, **values, **stop}


class Answer(NamedTuple):
    """What was written, and the tokens that it took, an end token counted."""

    text: str
    num_tokens: int


class Writer:
    """A model that answers, one prompt at a time as a stream, or many in batches."""

    def __init__(self, finished: Finished, sampling: Sampling) -> None:
        self.finished = finished
        self.tokenizer = finished.tokenizer
        self.sampling = sampling
        self.end_ids = end_ids(finished)
        self.has_answered_short = False

    def plain(self, text: str) -> Ids:
        """A text to continue, as the tokenizer begins one."""
        return list(self.tokenizer(text)["input_ids"])

    def asked(self, messages: Sequence[Message]) -> Ids:
        """A dialogue up to where the assistant's answer begins."""
        return self.templated(render(self.tokenizer, messages))

    def templated(self, text: str) -> Ids:
        """A text that already has its special tokens, written out."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def room(self, num_prompt_tokens: int) -> int:
        """How many tokens may be written; ConfigError where the prompt leaves no position free."""
        most = self.finished.num_positions
        asked = self.sampling.max_new_tokens
        if most is None or num_prompt_tokens + asked <= most:
            return asked
        if num_prompt_tokens >= most:
            reason = f"fills the {most} positions of the model"
            raise ConfigError("prompt", f"{num_prompt_tokens} tokens", reason, "shorten it")
        left = most - num_prompt_tokens
        if not self.has_answered_short:
            note = f"note: the model has {most} positions, so an answer ends after {left} tokens"
            print(note, file=sys.stderr)
            self.has_answered_short = True
        return left

    def stream(self, prompt: Ids) -> Answer:
        """Print an answer as it is written."""
        printer = Printer(self.tokenizer, self.sampling.stop)
        return self.answer(self.generate([prompt], printer)[0])

    def write(self, prompts: Sequence[Ids], batch_size: int) -> Iterator[Answer]:
        """An answer to each prompt, in order."""
        if self.sampling.repetition_penalty != 1:
            batch_size = 1  # the penalty would take a row's padding for text
        for first in range(0, len(prompts), batch_size):
            for written in self.generate(prompts[first : first + batch_size]):
                yield self.answer(written)

    def generate(self, prompts: Sequence[Ids], printer: "Printer | None" = None) -> list[Ids]:
        """The new tokens of each prompt, padded behind its end."""
        import torch

        model, width = self.finished.model, max(map(len, prompts))
        pad_id = self.tokenizer.pad_token_id
        if pad_id is None:
            pad_id = next(iter(self.end_ids), 0)  # masked, so that any would do
        # On the left, so that every prompt's last token stands where the answer begins.
        rows = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with torch.inference_mode():
            written_BL = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(seen, device=model.device),
                max_new_tokens=self.room(width),
                eos_token_id=sorted(self.end_ids) or None,
                pad_token_id=pad_id,
                tokenizer=self.tokenizer,
                streamer=printer,
                **self.sampling.options(),
            )
        return [[int(token) for token in row] for row in written_BL[:, width:]]

    def answer(self, written: Ids) -> Answer:
        """New tokens as text, up to their end."""
        ends = [index for index, token in enumerate(written) if token in self.end_ids]
        kept = written[: ends[0]] if ends else written
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        return Answer(before_stop(text, self.sampling.stop), len(kept) + bool(ends))


class Printer:
    """Prints tokens as text, holding back what may become a stop string.

    It has the two methods that ``generate`` calls of a streamer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.ids: Ids = []
        self.num_printed = 0
        self.is_prompt = True

    def put(self, tokens: Any) -> None:
        if not self.is_prompt:
            self.ids += tokens.flatten().tolist()
            self.show(is_last=False)
        self.is_prompt = False

    def end(self) -> None:
        self.show(is_last=True)
        print(flush=True)

    def show(self, is_last: bool) -> None:
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        kept = before_stop(text, self.stop)
        if not is_last:
            kept = kept.rstrip("\ufffd")  # the first bytes of a letter that is not whole yet
            held = max((overlap(kept, stop) for stop in self.stop), default=0)
            kept = kept[: len(kept) - held]
        print(kept[self.num_printed :], end="", flush=True)
        self.num_printed = max(self.num_printed, len(kept))


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string in it."""
    return text[: min([text.find(end) for end in stop if end in text], default=len(text))]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    return next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)


def template_of(tokenizer: "PreTrainedTokenizerBase") -> ChatTemplate:
    """The tokenizer's own chat template, else the plain one that training falls back on."""
    source = tokenizer.chat_template
    if isinstance(source, dict):  # several by name, as older tokenizers have
        source = source.get("default")
    tokens = {"eos_token": "", **tokenizer.special_tokens_map}
    return template_for(tokenizer.backend_tokenizer, source, tokens)


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> str:
    """A dialogue as text, up to where an answer begins; ConfigError where the template refuses."""
    from jinja2 import TemplateError

    try:
        return template_of(tokenizer).render(messages, asks=True)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        reason = f"is refused by the model's chat template: {' '.join(str(error).split())}"
        raise ConfigError("messages", roles, reason, "change the turns, or say --raw") from None


def end_ids(finished: Finished) -> set[int]:
    """The tokens that end an answer.

    Those of the model's and the tokenizer's settings, and what the chat template puts behind an
    answer where that is a special token.
    """
    tokenizer = finished.tokenizer
    ends: set[int | None] = set()
    for found in (
        finished.model.generation_config.eos_token_id,
        finished.model.config.eos_token_id,
        tokenizer.eos_token_id,
    ):
        ends |= set(found if isinstance(found, list) else [found])
    mark = template_of(tokenizer).end()
    if mark is not None:
        ends.add(tokenizer.backend_tokenizer.token_to_id(mark))
    return {end for end in ends if end is not None}


def shortened(writer: Writer, prompt: Ids) -> Ids:
    """The end of a prompt that is too long for the model to answer it."""
    most = writer.finished.num_positions
    if most is None:
        return prompt
    return prompt[-max(1, most - writer.sampling.max_new_tokens) :]
