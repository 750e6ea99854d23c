"""Documents that are not worth learning are left out, counted, and never held out."""

import json
from pathlib import Path

import pytest

from llmtrain.data.corpus import Deduplicate, Tokenizer
from llmtrain.data.filtering import Filter, letters, repeated
from llmtrain.data.shards import Manifest, prepare
from llmtrain.data.source.text import Text

GOOD = [f"Chapter {number}: the cat sat on the mat and looked at it." for number in range(40)]
SHORT = ["no", "so"]
TABLES = [f"| {number} | 1.0 | 2.0 | 3.0 | 4.0 | {'-' * 30}" for number in range(3)]
MENU = ["home\nabout\n" * 20 + f"only this is new: {number}" for number in range(4)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [*SHORT, *GOOD, *TABLES, *MENU, *GOOD[:5]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(path: Path, cache: Path, wanted: Filter, **more: Deduplicate) -> Manifest:
    corpus = Text(
        name="text",
        path=str(path),
        held_out_every=4,
        tokenizer=Tokenizer(vocab_size=300),
        filter=wanted,
        **more,  # type: ignore[arg-type]
    )
    return prepare(corpus, cache, progress=False)


def num_documents(manifest: Manifest) -> int:
    return sum(split.num_documents for split in manifest.splits.values())


def test_each_reason_leaves_out_what_it_says_and_is_counted(rows: Path, tmp_path: Path) -> None:
    wanted = Filter(min_characters=10, max_characters=400, min_letters=0.6, max_repeated=0.2)
    manifest = prepared(rows, tmp_path / "cache", wanted)
    assert num_documents(manifest) == len(GOOD) + 5
    assert manifest.lacks == {
        "shorter than 10 characters": len(SHORT),
        "less than 0.6 of it letters": len(TABLES),
        "more than 0.2 of it in repeated lines": len(MENU),
    }
    assert Manifest.load(manifest.folder).lacks == manifest.lacks


def test_without_a_filter_every_document_stays(rows: Path, tmp_path: Path) -> None:
    manifest = prepared(rows, tmp_path / "cache", Filter())
    assert num_documents(manifest) == 14 + len(GOOD)
    assert manifest.lacks == {}


def test_the_same_files_with_another_filter_are_other_tokens(rows: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    all_of_it, long = (prepared(rows, cache, wanted) for wanted in (Filter(), Filter(10)))
    assert all_of_it.folder != long.folder
    assert num_documents(all_of_it) - num_documents(long) == len(SHORT)


def test_copies_are_found_among_what_passed_the_filter(rows: Path, tmp_path: Path) -> None:
    cache, wanted = tmp_path / "cache", Filter(min_letters=0.6)
    manifest = prepared(rows, cache, wanted, deduplicate=Deduplicate.exact)
    assert manifest.num_repeated == 5
    assert num_documents(manifest) == len(GOOD) + len(SHORT) + len(MENU)


def test_letters_of_any_script_are_letters() -> None:
    assert letters("汉字 and привет") == 1
    assert letters("a1 b2") == 0.5
    assert letters(" \n") == 0


def test_a_line_counts_as_repeated_from_the_second_time_on() -> None:
    assert repeated("ab\n ab\n\nabcd") == 2 / 8
    assert repeated("") == 0
