"""What is learned of a dialogue is the assistant's text and its end, and it is asked as taught."""

# L tokens of a document

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from llmtrain.data.corpus import Document
from llmtrain.data.encoding import Encoder
from llmtrain.data.example import Example, LossOn, Message
from llmtrain.data.template import ChatTemplate, end_ids, open_template
from llmtrain.data.tokenizer import load, open_vocabulary
from llmtrain.errors import ConfigError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant'"
    " %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = (  # as Qwen3's, which drops what was thought before earlier answers
    "{% for message in messages %}{% set content = message.content if loop.last else "
    "message.content.split('</think>')[-1].lstrip('\n') %}<|im_start|>{{ message.role }}\n"
    "{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('No system\nrole') }}{% endif %}"
TEMPLATES = {"chatml": CHATML, "llama_3": LLAMA_3, "marked": MARKED, "plain": None}
ENDS = {"chatml": "<|im_end|>", "llama_3": "<|eot_id|>", "marked": "<|im_end|>", "plain": "</s>"}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXTS = ["What is two plus two? It is four.", "assistant\n\nuser\n\nsystem\n\n\n 你好，世界。"] * 4


def dialogue(*contents: str, system: str = "") -> Example:
    """Turns of user and assistant in their order, behind a system prompt if there is one."""
    turns = [
        Message("assistant" if number % 2 else "user", content)
        for number, content in enumerate(contents)
    ]
    first = [Message("system", system)] if system else []
    return Example("id", "mine.jsonl:3", messages=(*first, *turns))


DIALOGUES = {
    "one turn": dialogue("What is two plus two?", "It is four."),
    "several": dialogue("One?", "Yes.", "Two?", "No.", "Three?", "Perhaps.", system="Be brief."),
    "chinese": dialogue("你好，🙂 世界？", "世界：👩🏽‍💻 🙂", "再来？", "好的。🙂", system="简短"),
    "an answer that was in the prompt": dialogue("Say: Yes.", "Yes.", "Say Yes. again", "Yes."),
    "the name of a role": dialogue("assistant", "user\n\nassistant", "\n\n", "assistant"),
}
DIALOGUES["white space around"] = dialogue("Indent it.", "\n\n  four  \n", "Again\n", " four")
CASES = [  # Llama 3's template takes white space off
    (name, case)
    for name in TEMPLATES
    for case in DIALOGUES
    if (name, case) != ("llama_3", "white space around")
]

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a tokenizer's folder: a byte-level BPE with a template, unless it is told otherwise."""

    def make(template: str | None, eos: str = "</s>", **options: Any) -> Path:
        raw = options.pop("raw", None) or byte_level()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, **options)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return tmp_path / "tokenizer"

    return make


def byte_level(special: list[str] = SPECIAL) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": letters, "show_progress": False, "special_tokens": special}
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, **options))
    return raw


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a space before every text, and a token that each text begins with."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    options = {"show_progress": False, "special_tokens": [*SPECIAL, *bytes_]}
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, **options))
    return begin_with_bos(raw)


def begin_with_bos(raw: Tokenizer) -> Tokenizer:
    bos = [("<s>", raw.token_to_id("<s>"))]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return raw


def encoded(folder: Path, template: ChatTemplate, example: Example, on: LossOn) -> Any:
    """ids_L and mask_L of an example."""
    document = Document(example.id, *template.rendered(example, on))
    ((ids_L, mask_L),) = Encoder(open_vocabulary(folder), np.dtype("int64"))([document])
    return ids_L, mask_L


def learned(folder: Path, example: Example, on: LossOn) -> list[str]:
    """The runs of tokens that are learned, as text."""
    ids_L, mask_L = encoded(folder, open_template(folder, None), example, on)
    runs = groupby(zip(ids_L, mask_L, strict=True), key=lambda pair: pair[1])
    tokenizer = load(folder)
    return [
        tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        for is_learned, run in runs
        if is_learned
    ]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_assistants_text_and_its_end_are_learned_and_nothing_else(
    folder: Folder, name: str, case: str
) -> None:
    at, example = folder(TEMPLATES[name], bos_token="<s>"), DIALOGUES[case]
    said = [turn.content for turn in example.messages if turn.role == "assistant"]
    before = " " if name == "plain" else ""
    expected = [f"{before}{text}{ENDS[name]}" for text in said]
    assert learned(at, example, LossOn.assistant) == expected
    assert learned(at, example, LossOn.last) == expected[-1:]
    whole = open_template(at, None).render(example.messages)
    assert learned(at, example, LossOn.all) == [whole]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_what_is_asked_later_begins_what_was_learned_token_by_token(
    folder: Folder, name: str, case: str
) -> None:
    at, example = folder(TEMPLATES[name], bos_token="<s>"), DIALOGUES[case]
    template = open_template(at, None)
    ids_L, mask_L = encoded(at, template, example, LossOn.last)
    opened = PreTrainedTokenizerFast.from_pretrained(at)
    asked = opened(template.prompt(example), add_special_tokens=False)["input_ids"]
    assert ids_L[: len(asked)].tolist() == asked
    assert int(mask_L.argmax()) == len(asked)


PROMPTS = ["What is it? ", "It", "It is\n\n", "", "你好，🙂", "one\n ", "Answer: "]


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_and_its_completion_stand_as_they_are_begun_by_the_tokenizer(
    folder: Folder, has_bos: bool, prompt: str
) -> None:
    at = folder(CHATML, bos_token="<s>", raw=begin_with_bos(byte_level()) if has_bos else None)
    example = Example("id", "mine.jsonl:1", prompt=prompt, completion=" is four")
    ids_L, mask_L = encoded(at, open_template(at, None), example, LossOn.assistant)
    asked = PreTrainedTokenizerFast.from_pretrained(at)(prompt)["input_ids"]
    assert ids_L[: len(asked)].tolist() == asked
    assert mask_L.tolist() == [0] * len(asked) + [1] * (len(ids_L) - len(asked))
    text = load(at).decode(ids_L.tolist(), skip_special_tokens=False)
    assert text == "<s>" * has_bos + prompt + " is four</s>"
    assert encoded(at, open_template(at, None), example, LossOn.all)[1].all()


def test_a_tokenizer_that_puts_a_space_before_each_text_keeps_one_space(folder: Folder) -> None:
    at = folder(CHATML, bos_token="<s>", raw=sentencepiece())
    example = Example("id", "mine.jsonl:1", prompt="What is it?", completion=" It is four")
    ids_L, mask_L = encoded(at, open_template(at, None), example, LossOn.assistant)
    opened = PreTrainedTokenizerFast.from_pretrained(at)
    assert ids_L.tolist() == [*opened(example.prompt + example.completion)["input_ids"], 1]
    asked = opened(example.prompt)["input_ids"]
    assert ids_L[: len(asked)].tolist() == asked
    assert int(mask_L.argmax()) == len(asked)
    for text in learned(at, DIALOGUES["several"], LossOn.assistant):
        assert text in ("Yes.<|im_end|>", "No.<|im_end|>", "Perhaps.<|im_end|>")


def test_one_token_for_both_ends_begins_no_dialogue(folder: Folder) -> None:
    at = folder(None, bos_token="</s>")
    text, _ = open_template(at, None).rendered(DIALOGUES["several"], LossOn.all)
    assert text.startswith("Be brief.\n\nUser: One?\n\nAssistant: Yes.</s>\n\nUser: Two?")
    assert learned(at, DIALOGUES["one turn"], LossOn.assistant) == [" It is four.</s>"]


def test_the_tokens_that_end_answers_are_those_of_sequences_and_of_turns(folder: Folder) -> None:
    at = folder(CHATML)
    assert [load(at).id_to_token(end) for end in end_ids(at, CHATML)] == ["</s>", "<|im_end|>"]
    assert [load(at).id_to_token(end) for end in end_ids(at, None)] == ["</s>"]
    assert [load(at).id_to_token(end) for end in end_ids(at, STRICT)] == ["</s>"]


def test_a_template_that_rewrites_earlier_turns_teaches_the_last_answer_only(
    folder: Folder,
) -> None:
    at = folder(REWRITING)
    example = dialogue("One?", "<think>hm</think>\nYes.", "Two?", "<think>well</think>\nNo.")
    with pytest.raises(ConfigError, match=r"mine.jsonl:3 .* rewrites .*; set data.loss_on=last"):
        learned(at, example, LossOn.assistant)
    assert learned(at, example, LossOn.last) == ["<think>well</think>\nNo.<|im_end|>"]
    single = dialogue("One?", "<think>hm</think>\nYes.")
    assert learned(at, single, LossOn.assistant) == ["<think>hm</think>\nYes.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (STRICT, "refuses it: No system role"),
        ("{{ messages[0].content }}", "marks nothing or everything of a dialogue"),
        ("{% if not add_generation_prompt %}yes{% endif %}", "marks nothing or everything"),
        (
            "{% for message in messages %}{{ message.content }}{% endfor %}"
            "{% if add_generation_prompt %}<think>{% endif %}",
            "writes the last answer unlike what is asked with",
        ),
        ("{{ messages[9].content }}", "refuses it: "),
        ("{{ messages[0].content + 1 }}", "refuses it: "),
        ("{% for %}", "refuses it: "),
    ],
)
def test_a_template_that_does_not_tell_the_answer_is_refused_with_the_rows_place(
    folder: Folder, template: str, reason: str
) -> None:
    example = dialogue("One?", "Yes.", system="Be brief.")
    with pytest.raises(ConfigError, match=f"^data.path=mine.jsonl:3: the chat template {reason}"):
        learned(folder(template), example, LossOn.assistant)


def test_a_named_template_takes_the_place_of_the_tokenizers_own(folder: Folder) -> None:
    at = folder(LLAMA_3, bos_token="<s>")
    plain, chatml = (open_template(at, name) for name in ("plain", "chatml"))
    assert chatml.prompt(DIALOGUES["one turn"]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert plain.prompt(DIALOGUES["one turn"]) == "<s>User: What is two plus two?\n\nAssistant:"
    mine = at / "mine.jinja"
    mine.write_text("{{ messages }}")
    assert open_template(at, str(mine)).source == "{{ messages }}"
    with pytest.raises(ConfigError, match="data.template=chatlm is no chat template; .* chatml"):
        open_template(at, "chatlm")


def test_a_template_whose_marks_the_tokenizer_lacks_is_refused(folder: Folder) -> None:
    at = folder(None, raw=byte_level(["</s>"]))
    with pytest.raises(ConfigError, match="ends turns by <|im_end|>, which the tokenizer does not"):
        open_template(at, "chatml")
