"""`data=<name> data.stream=...`: the hub's files are read one by one, and none is kept."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.data.shards import Manifest, find_manifest, prepare
from llmtrain.errors import ConfigError, TrainingError
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
    assert kept(tmp_path) == ["test-00000-of-00001.parquet", *kept(tmp_path / "repository")[1:]]
    assert kept(tmp_path / "cache") == []


def test_a_stream_that_is_killed_goes_on_with_the_files_that_are_missing(
    hub: Hub, tmp_path: Path
) -> None:
    whole = shas(streamed(tmp_path / "whole"))
    words = [*SMALL, f"cache_root={tmp_path / 'cache'}", "data.num_workers=1"]
    command = [sys.executable, "-m", "llmtrain.data", "prepare", *words]
    cache = tmp_path / "cache"
    hub.stalled = SECOND
    begun = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(hub.halfway.is_set)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    hub.stalled = None
    hub.resumed.set()
    assert shas(streamed(cache)) == whole
    assert kept(cache) == []
    assert find_manifest(compose_config(*words).data, cache) is not None


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


def test_a_part_is_read_in_the_same_files_when_more_is_wanted(hub: Hub, tmp_path: Path) -> None:
    tokenizer = f"data.tokenizer.path={streamed(tmp_path / 'other').vocabulary.folder}"
    cache = tmp_path / "cache"
    (shard,) = streamed(cache, "data.stream=40m", tokenizer).train.shards
    hub.fetched.clear()
    shards = streamed(cache, tokenizer).train.shards
    assert shard in shards
    assert len(shards) == 2
    assert len(set(hub.fetched)) == 1


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


def test_terms_and_lost_files_are_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.lost.add(SECOND)
    with pytest.raises(TrainingError, match="broke off .* The same command continues"):
        streamed(tmp_path / "lost")
    hub.gated.add(WIKITEXT)
    with pytest.raises(ConfigError, match="wants its terms accepted"):
        streamed(tmp_path / "gated")
