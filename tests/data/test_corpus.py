import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.data.corpus import Tokenizer
from llmtrain.data.ranges import PIECE
from llmtrain.data.source.stdlib import Stdlib
from llmtrain.data.split import hold_out
from llmtrain.errors import ConfigError
from llmtrain.schema import kinds


def stdlib(**options):
    return Stdlib(name="stdlib", tokenizer=Tokenizer(vocab_size=512), held_out_every=20, **options)


def read(corpus):
    return {document.place: document.text for document in corpus.documents()}


def ids_held_out(corpus):
    holds_out = hold_out(corpus)
    return {document.place for document in corpus.documents() if holds_out(document.id)}


def test_every_source_is_found_by_listing_its_folder():
    known = {"chat", "mixture", "raft", "stdlib", "stdlib_qa", "stdlib_raft", "text"}
    assert set(kinds("data")) == known | {"published_chat", "published_text"}


def test_stdlib_is_source_code_without_tests_and_character_tables():
    ids = [document.id for document in stdlib().documents()]
    assert {"argparse.py", "json/decoder.py", "encodings/utf_8.py"} <= set(ids)
    assert "encodings/cp1252.py" not in ids
    assert not any(part in id.split("/") for id in ids for part in ("test", "site-packages"))
    assert ids == sorted(ids)


def test_stdlib_is_estimated_and_recognised_without_tokenising():
    corpus = stdlib()
    corpus.check()
    assert 1e6 < corpus.estimate_tokens() < 1e7
    assert corpus.fingerprint() == stdlib().fingerprint()


def test_stdlib_refuses_a_path_that_would_have_no_effect():
    with pytest.raises(
        ConfigError, match=r"^data.path=a.txt has no effect.* data=text data.path=a.txt"
    ):
        stdlib(path="a.txt").check()


def test_a_folder_is_read_with_all_below_it_in_order_of_ids(tmp_path, corpus_of):
    texts = {"b/one.md": "# Eins", "a.txt": "zwei\r\nlines", ".git/x.txt": "no", "c.bin": "no"}
    for name, text in texts.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    assert list(read(corpus_of()).items()) == [("a.txt", "zwei\r\nlines"), ("b/one.md", "# Eins")]


def test_a_glob_takes_what_it_matches_and_names_it_from_its_fixed_part(tmp_path, corpus_of):
    for name in ("a/x.txt", "a/y.md", "b/z.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert set(read(corpus_of("texts/*/*.txt"))) == {"a/x.txt", "b/z.txt"}
    assert set(read(corpus_of("texts/**/y.*"))) == {"a/y.md"}


def test_a_home_folder_may_be_written_as_a_tilde(texts, corpus_of, monkeypatch):
    monkeypatch.setenv("HOME", str(texts.parent))
    corpus = corpus_of()
    corpus.path = "~/texts"
    assert len(read(corpus)) == 40


def test_jsonl_and_parquet_give_one_document_a_row(tmp_path, corpus_of):
    rows = [{"body": "first"}, {"body": ""}, {"body": "第三"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for format in ("jsonl", "parquet"):
        corpus = corpus_of(f"a.{format}", text_field="body")
        corpus.check()
        assert read(corpus) == {f"a.{format}:1": "first", f"a.{format}:3": "第三"}
        assert corpus.num_bytes() > 10


def test_one_long_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, corpus_of):
    text = "".join(f"line {number} über\r\n" for number in range(20_000))
    (tmp_path / "long.txt").write_bytes(text.encode())
    pieces = read(corpus_of("long.txt"))
    assert list(pieces)[:2] == ["long.txt#0", "long.txt#1"]
    assert "".join(pieces.values()) == text
    assert all(piece.endswith("\n") for piece in pieces.values())
    assert ids_held_out(corpus_of("long.txt"))


def test_a_long_file_without_line_ends_is_cut_too(tmp_path, corpus_of):
    (tmp_path / "long.txt").write_text("x" * (5 * PIECE))
    assert all(len(piece) <= 2 * PIECE for piece in read(corpus_of("long.txt")).values())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "open', "is not JSON"),
        (b'["a list"]', "is not a JSON object"),
        (b'{"texts": "x"}', r"has no field text; set data.text_field \(the nearest is texts\)"),
        (b'{"text": 3}', "has int and not text in its field text"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "holds half of a surrogate pair"),
    ],
)
def test_a_bad_jsonl_row_is_named_by_file_and_line(tmp_path, corpus_of, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    corpus = corpus_of("rows.jsonl")
    corpus.check()
    with pytest.raises(ConfigError, match=rf"^data.path={path}:3: {reason}"):
        read(corpus)


def test_a_text_file_in_another_encoding_is_named_by_file_and_line(tmp_path, corpus_of):
    (tmp_path / "old.txt").write_bytes("fine\nköln\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"old.txt:2: is not UTF-8; convert the file"):
        read(corpus_of("old.txt"))


def test_a_wrong_text_field_is_refused_before_anything_is_read(tmp_path, corpus_of):
    table = pyarrow.Table.from_pylist([{"content": "x"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="has no column text; set data.text_field"):
        corpus_of("a.parquet").check()


def test_a_damaged_parquet_file_is_refused_in_one_line(tmp_path, corpus_of):
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ConfigError, match=r"a.parquet is not a parquet file \([^\n]*\); write it"):
        corpus_of("a.parquet").check()


def test_data_that_is_not_there_is_refused(tmp_path, corpus_of):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    reasons = {
        "missing": "does not exist",
        "empty": "holds no .txt, .md, .jsonl, .parquet file",
        "*.csv": "holds no .txt",
        "empty.txt": "is empty",
    }
    for path, reason in reasons.items():
        with pytest.raises(ConfigError, match=rf"^data.path=.* {reason}"):
            corpus_of(path).check()


def test_values_that_cannot_work_are_refused(texts, corpus_of):
    with pytest.raises(ConfigError, match="^data.held_out_every=1 leaves no document"):
        corpus_of(every=1).check()
    with pytest.raises(ConfigError, match="^data.tokenizer.vocab_size=256 has no room"):
        corpus_of(vocab_size=256).check()
    with pytest.raises(ConfigError, match="^data.tokenizer.path=./nowhere is not a folder"):
        corpus_of(tokenizer=Tokenizer("./nowhere", 300)).check()
    nothing = corpus_of()
    nothing.path = None
    with pytest.raises(ConfigError, match="^data.path=null is not set"):
        nothing.check()


def test_a_document_stays_on_its_side_when_others_are_added(texts, corpus_of):
    before = ids_held_out(corpus_of())
    names = {path.name for path in texts.iterdir()}
    for number in range(30):
        (texts / f"00_{number}.txt").write_text("another one, sorted before the rest")
    assert before
    assert ids_held_out(corpus_of()) & names == before


def test_few_documents_still_leave_one_held_out(tmp_path, corpus_of):
    (tmp_path / "few").mkdir()
    for name in "abc":
        (tmp_path / "few" / f"{name}.txt").write_text(name)
    assert len(ids_held_out(corpus_of("few", every=1_000_000))) == 1


def test_a_single_document_is_refused_since_nothing_could_be_held_out(tmp_path, corpus_of):
    (tmp_path / "one.txt").write_text("short")
    with pytest.raises(ConfigError, match="holds fewer than two different documents"):
        ids_held_out(corpus_of("one.txt", every=1_000_000))


def test_the_fingerprint_follows_the_files(texts: Path, corpus_of):
    before = corpus_of().fingerprint()
    assert corpus_of().fingerprint() == before
    (texts / "00.txt").write_text("changed")
    assert corpus_of().fingerprint() != before
