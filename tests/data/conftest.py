"""A corpus of real files, small enough to prepare in a blink."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.data.corpus import Tokenizer
from llmtrain.data.source.text import Text


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
