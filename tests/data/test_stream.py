"""`data=<name> data.stream=...`: the hub's files are read one by one, and none is kept."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.shards import Manifest, prepare
from llmtrain.errors import ConfigError, TrainingError
from llmtrain.held_out import documents_of
from llmtrain.plan.known import plan_as_known
from tests.conftest import wait_until
from tests.data.hub import FOLDER, MODULES, WIKITEXT, Hub
from tests.test_compose import compose_config

WORDS = ["data=wikitext", "data.stream=all", "data.held_out_every=4"]
SMALL = [*WORDS, "data.tokenizer.vocab_size=300"]
FIRST, SECOND = (f"{FOLDER}/train-0000{part}-of-00002.parquet" for part in range(2))


def streamed(cache: Path, *words: str) -> Manifest:
    data = compose_config(*SMALL, f"cache_root={cache}", *words).data
    return prepare(data, cache, progress=False)


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*.parquet"))


def shas(manifest: Manifest) -> list[str]:
    return [split.sha for split in manifest.splits.values()]


def test_a_stream_gives_the_tokens_of_a_download_and_keeps_no_file(
    hub: Hub, tmp_path: Path
) -> None:
    manifest = streamed(tmp_path / "cache")
    assert manifest.train.num_documents + manifest.held_out.num_documents == len(MODULES)
    assert len(manifest.train.shards) == 2
    assert kept(tmp_path / "cache") == []


@pytest.fixture
def tokenizer(hub: Hub, tmp_path: Path) -> str:
    """The word for a tokenizer that exists, so that files are read for their tokens alone."""
    word = f"data.tokenizer.path={streamed(tmp_path / 'trained').vocabulary.folder}"
    hub.fetched.clear()
    return word


def start(cache: Path, *words: str) -> "subprocess.Popen[bytes]":
    words = (*SMALL, f"cache_root={cache}", *words)
    command = [sys.executable, "-m", "llmtrain.data", "prepare", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def test_a_stream_that_is_killed_goes_on_with_the_files_that_are_missing(
    hub: Hub, tokenizer: str, tmp_path: Path
) -> None:
    whole = shas(streamed(tmp_path / "whole", tokenizer))
    hub.stalled = SECOND
    hub.fetched.clear()
    cache = tmp_path / "cache"
    begun = start(cache, tokenizer, "data.num_workers=1")
    wait_until(hub.halfway.is_set)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert hub.fetched == [FIRST, SECOND]
    hub.stalled = None
    hub.resumed.set()
    hub.fetched.clear()
    assert shas(streamed(cache, tokenizer)) == whole
    assert hub.fetched == [SECOND]
    assert kept(cache) == []


def test_machines_take_shares_of_a_stream_and_the_last_needs_no_hub(
    hub: Hub, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    words = [f"cache_root={cache}", tokenizer]
    both = [start(cache, tokenizer, "--share", f"{number}/2") for number in (1, 2)]
    assert [each.wait() for each in both] == [0, 0]
    assert sorted(hub.fetched) == [FIRST, SECOND]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    whole = compose_config(*SMALL, *words).data
    assert shas(prepare(whole, cache, progress=False)) == shas(streamed(cache, tokenizer))
    assert kept(cache) == []


def test_runs_that_read_the_same_files_at_once_wait_for_each_other(
    hub: Hub, tokenizer: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    begun = [start(cache, tokenizer, f"data.held_out_every={every}") for every in (4, 5, 6)]
    assert [each.wait() for each in begun] == [0, 0, 0]
    assert kept(cache) == []


def test_what_was_tokenised_is_read_without_a_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    found = shas(streamed(cache))
    hub.fetched.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert shas(streamed(cache)) == found
    assert hub.fetched == []
    with pytest.raises(ConfigError, match="does not answer; set a mirror"):
        streamed(tmp_path / "another")


def test_a_part_is_read_in_the_same_files_when_more_is_wanted(
    hub: Hub, tokenizer: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    (shard,) = streamed(cache, "data.stream=40m", tokenizer).train.shards
    (first,) = hub.fetched
    shards = streamed(cache, tokenizer).train.shards
    assert shard in shards
    assert len(shards) == 2
    assert sorted(hub.fetched) == [FIRST, SECOND]
    assert hub.fetched[0] == first


def test_other_files_of_the_catalogue_are_listed_anew(
    hub: Hub, tokenizer: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    streamed(cache, tokenizer)
    hub.fetched.clear()
    streamed(cache, tokenizer, f"data.published.files=[{FOLDER}/*00000-of-00002*]")
    assert hub.fetched == []  # it is tokenised, and is now all that there is
    assert len(streamed(cache, tokenizer, f"data.published.files=['{SECOND}']").train.shards) == 1


def add_files(hub: Hub, count: int) -> None:
    files = hub.repositories[WIKITEXT]
    for number in range(2, count):
        files[f"{FOLDER}/train-{number:05d}-of-00002.parquet"] = files[FIRST]


def test_a_mixture_trains_its_tokenizer_on_a_few_files_of_a_stream(
    hub: Hub, tmp_path: Path
) -> None:
    add_files(hub, 12)
    words = ["data=mixture", "+data@data.sources.web=wikitext", "data.sources.web.stream=all"]
    data = compose_config(*words, f"cache_root={tmp_path}").data
    assert len(list(data.slices())) == 12
    assert len(data.samples()) == 4


def test_a_tokenizer_that_learned_from_a_stream_leaves_its_files_free(
    hub: Hub, tmp_path: Path
) -> None:
    rows = [json.dumps({"text": f"row {number} of many"}) for number in range(2000)]
    files = {f"part{number}.jsonl": "\n".join(rows).encode() for number in range(2)}
    hub.repositories["org/rows"] = files
    words = ["data.published.hub=org/rows", "data.published.files=['*.jsonl']"]
    manifest = streamed(tmp_path / "cache", *words)
    assert manifest.train.num_documents + manifest.held_out.num_documents == 4000
    assert list((tmp_path / "cache/datasets").rglob("part*.jsonl")) == []


def test_a_model_is_compared_on_the_documents_of_a_few_files(hub: Hub, tmp_path: Path) -> None:
    add_files(hub, 12)
    data = compose_config(*SMALL, f"cache_root={tmp_path}").data
    unused: Any = None  # text is not written by a tokenizer
    assert documents_of(data, unused, only_held_out=True)
    assert len(hub.fetched) == 4


def test_what_a_stream_left_is_no_download(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = compose_config(*SMALL, f"cache_root={cache}").data
    (first, _) = data.slices()
    next(data.read_slice(first, Path(), print))  # not to its end
    assert kept(cache) == [Path(FIRST).name]
    assert compose_config("data=wikitext", f"cache_root={cache}").data.lack is not None


def test_a_plan_counts_a_stream_by_the_catalogue(hub: Hub, tmp_path: Path) -> None:
    hub.close()

    def planned(*words: str) -> int:
        cache = f"cache_root={tmp_path}"
        return plan_as_known(compose_config(*WORDS, *words, cache)).data.num_train_tokens

    assert planned("data.stream=40m") == pytest.approx(40e6 * 0.75, rel=0.01)
    assert planned() == pytest.approx(planned("data.stream=40m") * 118e6 / 40e6, rel=0.1)


@pytest.mark.parametrize("asked", ["much", "0b", "-1b"])
def test_a_stream_of_no_number_is_refused(asked: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say all, or a number of tokens such as 500m or 20b"):
        streamed(tmp_path, f"data.stream={asked}")


def test_a_place_that_is_no_folder_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("null", str(tmp_path / "file"), f"{tmp_path}/*"):
        with pytest.raises(ConfigError, match="is no folder, for data.stream"):
            streamed(tmp_path / "cache", f"data.path={path}")
    with pytest.raises(ConfigError, match=r"data.path=/proc/1/none cannot be written to"):
        streamed(tmp_path / "cache", "data.path=/proc/1/none")


def test_terms_and_lost_files_are_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.lost.add(SECOND)
    with pytest.raises(TrainingError, match="broke off .* The same command continues"):
        streamed(tmp_path / "lost")
    hub.gated.add(WIKITEXT)
    with pytest.raises(ConfigError, match="wants its terms accepted"):
        streamed(tmp_path / "gated")
