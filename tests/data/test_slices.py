"""Large data: in slices, by several processes, through kills, and always the same bytes."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.data import shards
from llmtrain.data.corpus import Deduplicate, OnBadRow, Tokenizer
from llmtrain.data.overlap import overlap_of
from llmtrain.data.ranges import PIECE, READERS, ranges_of
from llmtrain.data.rows import File, format_of
from llmtrain.data.shards import Manifest, prepare, prepare_share
from llmtrain.data.source import text
from llmtrain.data.source.text import Text
from llmtrain.errors import ConfigError
from tests.conftest import wait_until
from tests.data.test_shards import content_of

Corpora = Callable[..., Text]


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of two pieces, so that little text has many."""
    monkeypatch.setattr(text, "SLICE_BYTES", 2 * PIECE)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder of 1.5 MB: a long text, many rows, and small files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [
        f"line {number} über {number * 7919 % 1000} 第{number % 9}\n" for number in range(20_000)
    ]
    (folder / "long.txt").write_text("".join(lines))
    rows = [json.dumps({"text": " ".join(lines[n : n + 5])}) for n in range(0, 16_000, 5)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    for number in range(30):
        (folder / f"{number:02d}.md").write_text("".join(lines[number * 100 : number * 100 + 90]))
    return folder


def read(file: File, most_bytes: int) -> list[tuple[str, str]]:
    """All texts of a file, range after range."""
    reader = READERS[format_of(file.path)]
    ranges = ranges_of(file, most_bytes, "text")
    return [found for item in ranges for found in reader(item, "text", refuse)]


def refuse(error: ConfigError) -> None:
    raise error


@pytest.mark.parametrize("line_bytes", [1, 100, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE])
def test_a_text_is_the_same_in_ranges_and_nothing_of_it_is_lost(
    tmp_path: Path, line_bytes: int
) -> None:
    line = "é" * (line_bytes // 2) + "\n"
    content = "\ufeff" + line * (6 * PIECE // len(line.encode()) + 1)
    (tmp_path / "a.txt").write_text(content)
    file = File(tmp_path / "a.txt", "a.txt")
    whole = read(file, 2**40)
    assert "".join(text for _, text in whole) == content.removeprefix("\ufeff")
    assert all(len(text.encode()) <= 2 * PIECE for _, text in whole)
    for pieces in (1, 2, 3):
        assert [text for _, text in read(file, pieces * PIECE)] == [text for _, text in whole]


@pytest.mark.parametrize("most_bytes", [1, 17, 64, 1000])
def test_each_row_is_in_the_range_where_it_begins(tmp_path: Path, most_bytes: int) -> None:
    texts = [f"row {number} " * (number % 7) for number in range(200)]
    lines = "\n\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    found = read(File(tmp_path / "a.jsonl", "a.jsonl"), most_bytes)
    assert [text for _, text in found] == texts
    table = pyarrow.Table.from_pylist([{"other": 1, "text": text} for text in texts])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=13)
    found = read(File(tmp_path / "a.parquet", "a.parquet"), most_bytes)
    assert found == [(f"a.parquet:{n}", text) for n, text in enumerate(texts, start=1)]


def test_packed_files_have_the_documents_of_plain_ones(large: Path, corpus_of: Corpora) -> None:
    plain = [document.text for document in corpus_of().documents()]
    for number, path in enumerate(sorted(large.iterdir())):
        packed = path.with_name(path.name + (".gz", ".zst")[number % 2])
        if number % 2:
            with pyarrow.output_stream(str(packed), compression="zstd") as out:
                out.write(path.read_bytes())
        else:
            packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert [document.text for document in corpus_of().documents()] == plain


def test_a_damaged_archive_is_refused_in_one_line(large: Path, corpus_of: Corpora) -> None:
    packed = gzip.compress((large / "long.txt").read_bytes())
    (large / "long.txt.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ConfigError, match=r"long.txt.gz cannot be unpacked \(.*\); fetch or write"):
        list(corpus_of().documents())


def test_bad_bytes_and_rows_are_left_out_and_counted_where_that_is_asked(
    large: Path, corpus_of: Corpora, tmp_path: Path
) -> None:
    good = prepare(corpus_of(), tmp_path / "cache")
    content = (large / "long.txt").read_bytes()
    (large / "long.txt").write_bytes(content + b"k\xf6ln\n")
    rows = (large / "rows.jsonl").read_text()
    (large / "rows.jsonl").write_text(rows.replace("\n", "\n{broken\n", 3))
    with pytest.raises(ConfigError, match=r"long.txt:20001: is not UTF-8"):
        prepare(corpus_of(), tmp_path / "cache")
    skipping = corpus_of(on_bad_row=OnBadRow.skip)
    found = prepare(skipping, tmp_path / "cache", str(good.vocabulary.folder))
    assert found.num_skipped == 4
    assert [reason.split("@")[0].rsplit("/")[-1] for reason in found.skipped] == [
        "long.txt",
        *3 * ["rows.jsonl"],
    ]
    for name, split in found.splits.items():
        assert split.sha == good.splits[name].sha


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    large: Path, corpus_of: Corpora, tmp_path: Path, small_slices: None
) -> None:
    alone, *others = [
        prepare(corpus_of(num_workers=workers), tmp_path / f"cache{workers}")
        for workers in (1, 2, 3)
    ]
    assert len(alone.train.shards) > 5
    for other in others:
        assert content_of(other) == content_of(alone)


def test_shares_of_several_machines_make_the_same_whole(
    large: Path, corpus_of: Corpora, tmp_path: Path, small_slices: None
) -> None:
    whole = prepare(corpus_of(), tmp_path / "whole")
    corpus = corpus_of(num_workers=1)
    counts = [prepare_share(corpus, tmp_path / "shares", number, 3) for number in (2, 0, 1)]
    assert sum(counts) == len(list(corpus.slices()))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shares/shards").glob("*/*")}
    assert content_of(prepare(corpus, tmp_path / "shares")) == content_of(whole)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_changed_file_is_tokenised_again_and_no_other(
    large: Path, corpus_of: Corpora, tmp_path: Path, small_slices: None
) -> None:
    tokenizer = str(prepare(corpus_of(), tmp_path / "cache").vocabulary.folder)
    before = shards_of(prepare(corpus_of(), tmp_path / "cache", tokenizer))
    (large / "rows.jsonl").write_text('{"text": "another row"}\n')
    after = shards_of(prepare(corpus_of(), tmp_path / "cache", tokenizer))
    assert len(after - before) <= 2
    assert len(after & before) >= 4


def shards_of(manifest: Manifest) -> set[str]:
    return {shard.path for split in manifest.splits.values() for shard in split.shards}


def test_equal_documents_are_on_one_side_and_others_do_not_move_them(
    tmp_path: Path, corpus_of: Corpora
) -> None:
    texts = [f"document {number}" for number in range(60)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    first = sides(corpus_of("texts.jsonl"))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["new", *texts, *texts]))
    assert sides(corpus_of("texts.jsonl")) >= first
    assert {is_held_out for _, is_held_out in first} == {True, False}


def sides(corpus: Text) -> set[tuple[str, bool]]:
    holds_out = shards.hold_out(corpus)
    return {(document.text, holds_out(document.id)) for document in corpus.documents()}


PREPARING = """
import sys
from pathlib import Path
from llmtrain.data.corpus import Tokenizer
from llmtrain.data.ranges import PIECE
from llmtrain.data.shards import prepare
from llmtrain.data.source import text
if __name__ == "__main__":
    text.SLICE_BYTES = 2 * PIECE
    path, cache, tokenizer = sys.argv[1:]
    options = {"tokenizer": Tokenizer(tokenizer), "held_out_every": 4, "num_workers": 2}
    prepare(text.Text(name="text", path=path, **options), Path(cache))
"""


def test_a_kill_costs_only_the_slices_at_work_and_leaves_no_worker(
    large: Path, corpus_of: Corpora, tmp_path: Path, small_slices: None
) -> None:
    first = prepare(corpus_of(), tmp_path / "whole")
    corpus = corpus_of(tokenizer=Tokenizer(str(first.vocabulary.folder)))
    whole = prepare(corpus, tmp_path / "whole")
    program = tmp_path / "preparing.py"
    program.write_text(PREPARING)
    cache = tmp_path / "cache"
    words = [sys.executable, str(program), str(large), str(cache), str(first.vocabulary.folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(words, env=environment)
    wait_until(lambda: len(done_in(cache)) >= 2)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers
    wait_until(lambda: not any(worker.is_running() for worker in workers))
    done = done_in(cache)
    assert content_of(prepare(corpus, cache)) == content_of(whole)
    assert done == {path: path.stat().st_mtime_ns for path in done}


def done_in(cache: Path) -> dict[Path, int]:
    """The records of slices that are whole, and when they were written."""
    records = [path for path in cache.glob("shards/*/slice.json") if not path.parent.suffix]
    return {path: path.stat().st_mtime_ns for path in records}


def test_copies_are_left_out_wherever_they_stand(
    large: Path, corpus_of: Corpora, tmp_path: Path, small_slices: None
) -> None:
    plain = prepare(corpus_of(), tmp_path / "cache")
    (large / "zz_copy.jsonl").write_text((large / "rows.jsonl").read_text())
    exact = corpus_of(deduplicate=Deduplicate.exact)
    found = prepare(exact, tmp_path / "cache", str(plain.vocabulary.folder))
    assert found.num_repeated == 3200
    for name, split in found.splits.items():
        assert split.num_documents == plain.splits[name].num_documents
        assert split.num_tokens == plain.splits[name].num_tokens


def test_a_document_that_is_much_like_another_is_left_out(
    tmp_path: Path, corpus_of: Corpora
) -> None:
    words = [f"word{number * number % 977}" for number in range(3000)]
    texts = [" ".join(words[number * 300 : number * 300 + 300]) for number in range(10)]
    near = texts[4].replace("word16", "other", 1)
    chinese = "一个文件与另一个文件几乎相同时只保留第一个" * 9
    short = ["what is the capital of france", "what is the capital of spain", "?!", "...", "short"]
    rows = [*texts, near, chinese, chinese + "。", *short]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    manifest = prepare(corpus_of("texts.jsonl", deduplicate=Deduplicate.near), tmp_path / "cache")
    assert manifest.num_repeated == 2
    assert sum(split.num_documents for split in manifest.splits.values()) == len(rows) - 2


def test_what_is_held_out_and_stands_in_the_training_text_is_measured(
    tmp_path: Path, corpus_of: Corpora
) -> None:
    passage = " ".join(f"unique{number}" for number in range(80))
    texts = [f"{passage} {number}" for number in range(40)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert overlap_of(prepare(corpus_of("texts.jsonl"), tmp_path / "cache")) > 0.9
    apart = [" ".join(f"w{number}x{k}" for k in range(80)) for number in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in apart))
    assert overlap_of(prepare(corpus_of("texts.jsonl"), tmp_path / "cache")) == 0


def test_a_wrong_field_is_refused_also_where_bad_rows_are_skipped(
    tmp_path: Path, corpus_of: Corpora
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 1000)
    with pytest.raises(ConfigError, match=r"a.jsonl:101: has no field txt"):
        corpus_of("a.jsonl", text_field="txt", on_bad_row=OnBadRow.skip).check()


def test_a_slice_without_documents_changes_nothing(
    large: Path, corpus_of: Corpora, tmp_path: Path, small_slices: None
) -> None:
    (large / "wide.jsonl").write_text(json.dumps({"text": "word " * PIECE}))
    manifest = prepare(corpus_of(deduplicate=Deduplicate.exact), tmp_path / "cache")
    empty = [each for each in (tmp_path / "cache/marks").glob("*/*.npy") if not len(np.load(each))]
    assert empty
    assert manifest.num_repeated == 0


def test_a_tokenizer_with_another_end_has_shards_of_its_own(
    large: Path, corpus_of: Corpora, tmp_path: Path
) -> None:
    first = prepare(corpus_of(), tmp_path / "cache")
    other = tmp_path / "other"
    shutil.copytree(first.vocabulary.folder, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "x"}))
    second = prepare(corpus_of(), tmp_path / "cache", str(other))
    assert second.vocabulary.eos_id != first.vocabulary.eos_id
    for manifest in (first, second):
        tokens = np.fromfile(manifest.folder / manifest.train.shards[0].path, manifest.dtype)
        assert tokens[-1] == manifest.vocabulary.eos_id


def test_what_is_tokenised_needs_no_room_again(
    large: Path, corpus_of: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_share(corpus_of(), tmp_path / "cache", 0, 1)
    monkeypatch.setattr(shards, "BYTES_PER_TOKEN", 1e-15)
    assert prepare(corpus_of(), tmp_path / "cache").train.num_tokens
