import json
from pathlib import Path

import pytest

from llmtrain.data.corpus import Tokenizer
from llmtrain.data.source.text import id_of
from llmtrain.data.split import hold_out
from llmtrain.data.tokenizer import (
    END_OF_DOCUMENT,
    load,
    make_vocabulary,
    open_vocabulary,
    origin_of,
)
from llmtrain.errors import ConfigError

HARD_TEXT = f"def f(x):\n\treturn x  # 你好，世界 🙂 ¿qué?\r\n {END_OF_DOCUMENT} "


def make(corpus, cache_root: Path, tokenizer_path: str | None = None):
    origin = origin_of(corpus, corpus.fingerprint(), tokenizer_path)
    return make_vocabulary(origin, cache_root)


def test_the_trained_tokenizer_gives_back_any_text(texts, corpus_of, tmp_path):
    vocabulary = make(corpus_of(), tmp_path / "cache")
    tokenizer = load(vocabulary.folder)
    ids = tokenizer.encode(HARD_TEXT).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == HARD_TEXT
    assert vocabulary.eos_id not in ids  # a document that spells the token out does not end there
    assert max(ids) < vocabulary.size == 300


def test_training_twice_gives_the_same_bytes(texts, corpus_of, tmp_path):
    one, two = (make(corpus_of(), tmp_path / name) for name in ("one", "two"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (one.folder / file).read_bytes() == (two.folder / file).read_bytes()
    assert one.sha == two.sha


def test_only_the_train_split_shapes_the_merges(texts, corpus_of, tmp_path):
    before = make(corpus_of(), tmp_path / "cache")
    holds_out = hold_out(corpus_of())
    for path in texts.iterdir():
        if holds_out(id_of(path.read_text())):
            others = (f"{'q' * 20} {number} " * 200 for number in range(100))
            path.write_text(next(text for text in others if holds_out(id_of(text))))
    after = make(corpus_of(), tmp_path / "cache")
    assert after.folder != before.folder
    assert after.sha == before.sha


@pytest.mark.parametrize("model_type", ["llama", "mamba", "mixtral"])
def test_transformers_opens_the_folder_and_agrees(texts, corpus_of, tmp_path, model_type):
    from transformers import AutoTokenizer

    vocabulary = make(corpus_of(), tmp_path / "cache")
    config = {"model_type": model_type, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
    (vocabulary.folder / "config.json").write_text(json.dumps(config))  # as beside a model
    opened = AutoTokenizer.from_pretrained(vocabulary.folder)
    text = HARD_TEXT.replace(END_OF_DOCUMENT, "")
    assert opened(text)["input_ids"] == load(vocabulary.folder).encode(text).ids
    assert opened.decode(opened(text)["input_ids"]) == text
    assert opened.eos_token_id == opened.pad_token_id == vocabulary.eos_id
    assert len(opened) == vocabulary.size


def test_a_tokenizer_from_a_folder_is_copied_without_the_rest(texts, corpus_of, tmp_path):
    given = make(corpus_of(), tmp_path / "cache")
    (given.folder / "model.safetensors").write_bytes(b"weights")
    corpus = corpus_of(tokenizer=Tokenizer(path=str(given.folder), vocab_size=300))
    taken = make(corpus, tmp_path / "other")
    assert (taken.size, taken.eos_id) == (given.size, given.eos_id)
    assert not (taken.folder / "model.safetensors").exists()
    assert load(taken.folder).encode(HARD_TEXT).ids == load(given.folder).encode(HARD_TEXT).ids
    assert open_vocabulary(taken.folder) == taken


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(texts, corpus_of, tmp_path):
    (tmp_path / "nothing").mkdir()
    corpus = corpus_of(tokenizer=Tokenizer(path=str(tmp_path / "nothing"), vocab_size=300))
    with pytest.raises(
        ConfigError, match=r"^data.tokenizer.path=.*nothing gives no tokenizer \(.+"
    ):
        make(corpus, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"^model.path=.*nothing gives no tokenizer"):
        make(corpus, tmp_path / "cache", tokenizer_path=str(tmp_path / "nothing"))
    assert not list((tmp_path / "cache" / "tokenizers").glob("*.partial"))
