"""The catalogue: what it says of published data sets, and what may be done without their files."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmtrain.data.__main__ import main
from llmtrain.data.catalogue import Published, RowFormat, entries, find_entry, parse_size
from llmtrain.data.corpus import Tokenizer
from llmtrain.data.source.published_text import PublishedText
from llmtrain.errors import ConfigError
from llmtrain.plan import make_plan
from llmtrain.plan.known import plan_as_known
from tests.conftest import ROOT
from tests.test_compose import call, compose_config

NAMES = [entry.name for entry in entries()]
ASKED_FOR = {
    "alpaca", "belle", "bookcorpus", "c4", "cc_news", "chinese_fineweb_edu", "cluecorpus_small",
    "codeparrot", "dclm", "fineweb_edu", "fineweb_edu_100bt", "fineweb_edu_10bt", "openhermes",
    "openwebtext", "pile", "sharegpt", "skypile", "wikitext", "wudao",
}  # fmt: skip
READABLE = (".parquet", ".jsonl", ".json", ".json.gz", ".jsonl.zst", ".txt")


@pytest.fixture(autouse=True)
def cache_without_data(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was downloaded yet."""
    monkeypatch.setenv("LLMTRAIN_CACHE", str(cache))


def test_the_well_known_data_sets_are_in_the_catalogue() -> None:
    assert set(NAMES) >= ASKED_FOR


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_says_where_the_data_are_and_what_one_may_do_with_them(name: str) -> None:
    published = find_entry(name).published
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", published.hub)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", published.modelscope or published.hub)
    assert published.language in ("en", "zh", "code")
    assert len(published.files) == 1 or published.format is RowFormat.text
    assert all(pattern.endswith(READABLE) for pattern in published.files)
    assert published.licence and published.suits and published.counted_with
    bytes_a_token = published.download_gib * 2**30 / published.num_tokens
    assert 0.5 < bytes_a_token < 8


def test_every_entry_composes_and_is_planned_without_its_data() -> None:
    for entry in entries():
        published, words = entry.published, [f"data={entry.name}", "hardware=a800x1"]
        is_text = published.format is RowFormat.text
        more = [] if is_text else ["mode=sft", "train.seq_len=64"]
        config = compose_config(*words, *more)
        plan = make_plan(config)
        assert config.data.name == plan.data.name == entry.name
        assert plan.data.is_estimate
        told = published.num_tokens * (1 - config.data.held_out_fraction)
        assert plan.data.num_train_tokens == pytest.approx(told, rel=0.01)


def test_a_plan_from_the_catalogue_is_marked_as_an_estimate() -> None:
    plan = plan_as_known(compose_config("data=fineweb_edu", "model=llama_1b", "hardware=a800x8"))
    assert plan.data.is_estimate
    assert plan.num_tokens == pytest.approx(20e9, rel=0.01)
    assert plan.num_epochs < 0.02


def test_a_run_before_the_download_is_refused_with_the_command_that_fetches(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    cache: Path,
) -> None:
    outputs = tmp_path / "outputs"
    words = ["data=wikitext", "hardware=cpux1", f"output_root={outputs}"]
    assert call(words, monkeypatch) == 2
    said = capfd.readouterr().err
    folder = cache / "datasets/wikitext"
    assert said == (
        f"data=wikitext is not in {folder} yet (0.292 GiB); "
        "fetch it: python -m llmtrain.data download wikitext.\n"
    )
    assert not outputs.exists()
    assert call([*words, "data.path=/nowhere/else"], monkeypatch) == 2
    assert "download wikitext --to /nowhere/else.\n" in capfd.readouterr().err


def test_another_data_set_is_another_run_and_another_folder_is_not() -> None:
    run = compose_config("data=wikitext")
    assert run.identity != compose_config("data=tinystories").identity
    assert run.identity != compose_config("data=text").identity
    assert run.identity == compose_config("data=wikitext", "data.path=/elsewhere").identity


LINES = [json.dumps({"text": f"Line {number}."}) for number in range(40)]


def packed_zst(path: Path, content: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)


WRITERS: dict[str, Callable[[Path, bytes], object]] = {
    "part.json": Path.write_bytes,
    "part.jsonl": Path.write_bytes,
    "part.json.gz": lambda path, content: path.write_bytes(gzip.compress(content)),
    "part.jsonl.zst": packed_zst,
}


def corpus_at(folder: Path, *patterns: str) -> PublishedText:
    published = Published(hub="org/name", files=list(patterns))
    return PublishedText(
        name="mine",
        path=str(folder),
        published=published,
        held_out_every=4,
        tokenizer=Tokenizer(vocab_size=300),
    )


@pytest.mark.parametrize("name", WRITERS)
def test_published_files_are_read_as_they_come(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, "\n".join(LINES).encode())
    corpus = corpus_at(tmp_path, f"*{name.partition('.')[1]}*")
    corpus.check()
    found = list(corpus.documents())
    assert [document.text for document in found] == [f"Line {number}." for number in range(40)]
    assert found[0].place == f"{name}:1"
    assert corpus.num_bytes() > 0


def test_two_packed_parts_in_one_file_are_both_read(tmp_path: Path) -> None:
    parts = [gzip.compress(f"{line}\n".encode()) for line in LINES[:2]]
    (tmp_path / "part.json.gz").write_bytes(b"".join(parts))
    assert len(list(corpus_at(tmp_path, "*.gz").documents())) == 2


def test_only_the_files_of_the_data_are_read(tmp_path: Path) -> None:
    for name in ("train", "test"):
        table = pyarrow.table({"text": [name]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    (tmp_path / "README.txt").write_text("Not data.")
    documents = corpus_at(tmp_path, "train*.parquet").documents()
    assert [document.text for document in documents] == ["train"]


def test_only_the_rows_of_the_data_are_learned(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {number}.", "output": f"{number}."} for number in range(3)]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "Belle_open_source_1M.json").write_text(lines)
    (tmp_path / "other.json").write_text(lines)
    data = compose_config("mode=sft", "data=belle", f"data.path={tmp_path}").data
    data.check()
    assert len(list(data.ids())) == 3
    assert data.fingerprint()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"no gzip at all", id="another file"),
        pytest.param(gzip.compress(b'{"text": "x"}\n')[:-9], id="cut off"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "part.json.gz").write_bytes(content)
    with pytest.raises(ConfigError, match="fetch or write it again") as refused:
        list(corpus_at(tmp_path, "*.gz").documents())
    assert str(refused.value).startswith(f"data.path={tmp_path}/part.json.gz cannot be unpacked (")


def test_the_list_is_filtered_by_language_and_by_a_models_size(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["list"]) == 0
    said = capfd.readouterr().out
    assert all(name in said for name in NAMES)
    assert main(["list", "--language", "zh", "--for", "1b", "--format", "json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    names = {entry["name"] for entry in listed}
    assert {"skypile", "chinese_fineweb_edu", "belle"} <= names
    assert "wikipedia_zh" not in names  # 0.7B tokens, four times, are not 20B
    assert {entry["language"] for entry in listed} == {"zh"}
    skypile = next(entry for entry in listed if entry["name"] == "skypile")
    assert (skypile["num_tokens"], skypile["tokens_are_estimate"]) == (150e9, False)
    assert skypile["page"] == "https://huggingface.co/datasets/Skywork/SkyPile-150B"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["list", "--language", "de"],
            "--language=de is in no data set; choose one of code, en, zh.",
        ),
        (["list", "--for", "large"], "--for=large is no size of a model; give one such as 350m"),
    ],
)
def test_what_the_list_cannot_show_is_said_in_one_line(
    words: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert reason in said


def test_the_list_needs_no_torch() -> None:
    script = (
        "import sys; from llmtrain.data.__main__ import main; main(['list']); "
        "sys.exit(len({'torch', 'transformers', 'datasets', 'hydra'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(text) for text in ("350m", "1.3B", "2t")] == [350e6, 1.3e9, 2e12]
    assert parse_size("llama_7b") is None
