"""A corpus of real files, small enough to prepare in a blink."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain.data.corpus import Tokenizer
from llmtrain.data.source.text import Text
from tests.data.hub import WIKITEXT, Hub, write_wikitext


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[..., Text]:
    """Makes the corpus of a path below ``tmp_path``."""

    def make(path: str = "texts", vocab_size: int = 300, every: int = 4, **options: object) -> Text:
        tokenizer = Tokenizer(vocab_size=vocab_size)
        values = {"held_out_every": every, "tokenizer": tokenizer, **options}
        return Text(name="text", path=str(tmp_path / path), **values)

    return make


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 40 short files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        words = " ".join(f"word{number * k % 17}" for k in range(30))
        (folder / f"{number:02d}.txt").write_text(f"Text {number}: {words}\n", encoding="utf-8")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has WikiText's files, with modules of the standard library as their rows."""
    found = Hub()
    write_wikitext(tmp_path / "repository")
    found.add(WIKITEXT, tmp_path / "repository")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield found
    found.close()
