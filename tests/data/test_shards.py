import hashlib
import lzma
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from llmtrain.data import shards, tokenising
from llmtrain.data.shards import Manifest, find_manifest, prepare
from llmtrain.data.source.text import id_of
from llmtrain.data.split import hash_of, hold_out
from llmtrain.data.tokenising import index_of
from llmtrain.data.tokenizer import load
from llmtrain.errors import ConfigError


def content_of(manifest: Manifest) -> dict[str, str]:
    """The hash of each file that a manifest stands for, by its path in the cache."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    files = [manifest.folder / shard.path for shard in shards]
    files += [manifest.folder / "manifest.json", *(index_of(file) for file in files)]
    cache = manifest.folder.parent.parent
    return {
        os.path.relpath(file, cache): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def test_every_document_stands_in_its_split_and_ends_with_eos(texts, corpus_of, tmp_path):
    corpus = corpus_of()
    manifest = prepare(corpus, tmp_path / "cache")
    holds_out = hold_out(corpus)
    tokenizer = load(manifest.vocabulary.folder)
    for name, split in manifest.splits.items():
        documents = [d for d in corpus.documents() if holds_out(d.id) == (name == "held_out")]
        (shard,) = split.shards
        stream = np.fromfile(manifest.folder / shard.path, dtype=manifest.dtype)
        starts = np.load(index_of(manifest.folder / shard.path))
        parts = np.split(stream, starts[1:])
        assert [tokenizer.decode(part[:-1]) for part in parts] == [d.text for d in documents]
        assert {part[-1] for part in parts} == {manifest.vocabulary.eos_id}
        assert (split.num_documents, split.num_tokens) == (len(documents), len(stream))
        assert split.num_bytes == sum(len(document.text.encode()) for document in documents)


def test_preparing_twice_gives_the_same_bytes(texts, corpus_of, tmp_path):
    one, two = (prepare(corpus_of(), tmp_path / name) for name in ("one", "two"))
    assert content_of(one) == content_of(two)
    assert one.fingerprint == two.fingerprint


def test_preparing_again_does_no_work(texts, corpus_of, tmp_path, monkeypatch):
    assert find_manifest(corpus_of(), tmp_path / "cache") is None
    manifest = prepare(corpus_of(), tmp_path / "cache")
    monkeypatch.setattr(shards, "tokenise_all", None)  # calling it would fail
    assert prepare(corpus_of(), tmp_path / "cache") == manifest
    assert find_manifest(corpus_of(), tmp_path / "cache") == manifest
    assert Manifest.load(manifest.folder) == manifest


def test_a_shard_that_was_damaged_is_refused_with_what_to_do(texts, corpus_of, tmp_path):
    manifest = prepare(corpus_of(), tmp_path / "cache")
    file = manifest.folder / manifest.train.shards[0].path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="is another; remove that folder") as refused:
        prepare(corpus_of(), tmp_path / "cache")
    assert str(file.resolve().parent) in str(refused.value)
    shutil.rmtree(file.parent)
    assert content_of(prepare(corpus_of(), tmp_path / "cache")) == content_of(manifest)


def test_hashes_of_more_than_is_read_at_a_start_are_compared_when_asked(
    texts, corpus_of, tmp_path, monkeypatch
):
    manifest = prepare(corpus_of(), tmp_path / "cache")
    monkeypatch.setattr(shards, "VERIFIED_BYTES", 10)
    monkeypatch.setattr(tokenising, "TOKENS_AT_ONCE", 7)
    shards.verify(manifest)
    file = manifest.folder / manifest.held_out.shards[0].path
    file.write_bytes(file.read_bytes()[::-1])
    prepare(corpus_of(), tmp_path / "cache")
    with pytest.raises(ConfigError, match="is another"):
        shards.verify(manifest)


def test_a_cache_may_move(texts, corpus_of, tmp_path):
    prepare(corpus_of(), tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "moved")
    manifest = find_manifest(corpus_of(), tmp_path / "moved")
    assert manifest is not None
    assert manifest.vocabulary.folder.is_dir()


def test_other_sources_tokenizer_or_split_are_prepared_anew(texts, corpus_of, tmp_path):
    cache = tmp_path / "cache"
    prepare(corpus_of(), cache)
    assert find_manifest(corpus_of(vocab_size=301), cache) is None
    assert find_manifest(corpus_of(every=5), cache) is None
    assert find_manifest(corpus_of(keep_documents_apart=True), cache) is not None
    (texts / "00.txt").write_text("changed")
    assert find_manifest(corpus_of(), cache) is None


def test_a_pretrained_models_tokenizer_goes_first(texts, corpus_of, tmp_path):
    given = prepare(corpus_of(), tmp_path / "cache").vocabulary
    corpus = corpus_of(vocab_size=400)
    manifest = prepare(corpus, tmp_path / "cache", tokenizer_path=str(given.folder))
    assert manifest.vocabulary.size == given.size
    assert find_manifest(corpus, tmp_path / "cache", str(given.folder)) == manifest
    assert find_manifest(corpus, tmp_path / "cache") is None


def test_what_a_killed_process_left_is_cleared(texts, corpus_of, tmp_path):
    manifest = prepare(corpus_of(), tmp_path / "cache")
    whole = content_of(manifest)
    shard = (manifest.folder / manifest.train.shards[0].path).resolve()
    partial = shard.parent.with_name(shard.parent.name + ".partial")
    partial.mkdir()
    (partial / "train.bin").touch()
    shard.unlink()
    assert find_manifest(corpus_of(), tmp_path / "cache") is None
    assert content_of(prepare(corpus_of(), tmp_path / "cache")) == whole
    assert not partial.exists()


def test_two_processes_at_once_do_the_work_once(texts, tmp_path):
    program = f"""
from pathlib import Path
from llmtrain.data import shards, tokenising
from llmtrain.data.corpus import Tokenizer
from llmtrain.data.source.text import Text
work = shards.tokenise_all
shards.tokenise_all = lambda *values: print("worked") or work(*values)
corpus = Text(name="text", path={str(texts)!r}, held_out_every=4, tokenizer=Tokenizer(None, 300))
shards.prepare(corpus, Path({str(tmp_path / "cache")!r}))
"""
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(out for out, _ in outputs) == [b"", b"worked\n"]


def test_large_vocabularies_take_four_bytes_a_token(texts, corpus_of, tmp_path, monkeypatch):
    given = prepare(corpus_of(), tmp_path / "cache").vocabulary
    vocabulary = shards.Vocabulary(given.folder, 70_001, given.eos_id, given.sha)
    monkeypatch.setattr(shards, "make_vocabulary", lambda *_: vocabulary)
    manifest = prepare(corpus_of(), tmp_path / "other")
    assert manifest.dtype == "uint32"
    file = manifest.folder / manifest.train.shards[0].path
    assert file.stat().st_size == 4 * manifest.train.num_tokens


def test_held_out_text_is_compared_with_xz(texts, corpus_of, tmp_path, monkeypatch):
    corpus = corpus_of()
    manifest = prepare(corpus, tmp_path / "cache")
    holds_out = hold_out(corpus)
    text = "".join(d.text for d in corpus.documents() if holds_out(d.id)).encode()
    bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert manifest.held_out_xz_bits_per_byte == pytest.approx(bits)
    monkeypatch.setattr(shards, "MOST_XZ_BYTES", len(text) - 1)
    assert prepare(corpus, tmp_path / "other").held_out_xz_bits_per_byte is None


def test_neither_split_is_empty_even_where_every_hash_says_held_out(tmp_path, corpus_of):
    (tmp_path / "texts").mkdir()
    texts = (f"held out, all of them, {number}" for number in range(100))
    for number, text in enumerate([text for text in texts if is_held_out_by_half(text)][:3]):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    manifest = prepare(corpus_of(every=2), tmp_path / "cache")
    assert (manifest.train.num_documents, manifest.held_out.num_documents) == (1, 2)


def is_held_out_by_half(text: str) -> bool:
    return hash_of(id_of(text)) % 2 == 0


def test_a_full_disk_is_foreseen(texts, corpus_of, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BYTES_PER_TOKEN", 1e-15)
    with pytest.raises(ConfigError, match=r"^cache_root=.* GiB free and the tokens take up to"):
        prepare(corpus_of(), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_refused(texts, corpus_of, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="^cache_root=.* cannot be made"):
        prepare(corpus_of(), tmp_path / "file")


def test_preparing_imports_neither_torch_nor_transformers(texts, tmp_path):
    program = f"""
import sys
from pathlib import Path
from llmtrain.data.corpus import Tokenizer
from llmtrain.data.shards import prepare
from llmtrain.data.source.text import Text
corpus = Text(name="text", path={str(texts)!r}, held_out_every=4, tokenizer=Tokenizer(None, 300))
prepare(corpus, Path({str(tmp_path / "cache")!r}))
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
