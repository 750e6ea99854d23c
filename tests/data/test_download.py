"""`python -m llmtrain.data download`, by the hub's own library from a hub on this machine."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.data.__main__ import main
from llmtrain.data.shards import find_manifest, prepare
from llmtrain.errors import ConfigError
from tests.conftest import ROOT, wait_until
from tests.data.hub import FOLDER, MODULES, WIKITEXT, Hub
from tests.test_compose import compose_config


def downloaded(tmp_path: Path) -> list[str]:
    """The names of the data that lie where the download puts them."""
    return sorted(path.name for path in (tmp_path / "cache/datasets/wikitext").rglob("*.parquet"))


def start(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "llmtrain.data", "download", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_was_downloaded_is_what_the_name_then_trains_on(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["data=wikitext", "data.held_out_every=4", "data.tokenizer.vocab_size=300"]
    with pytest.raises(ConfigError, match="fetch it: python -m llmtrain.data download wikitext"):
        prepare(compose_config(*words).data, tmp_path / "cache")
    assert main(["download", "wikitext"]) == 0
    said = capfd.readouterr().out
    assert "WikiText-103: 2 files, 0.000" in said
    assert f"from {hub.address}/datasets/{WIKITEXT}. Licence: CC BY-SA 3.0, GFDL." in said
    assert said.endswith("Use it: python -m llmtrain.run data=wikitext\n")
    assert downloaded(tmp_path) == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    data = compose_config(*words).data
    manifest = prepare(data, tmp_path / "cache", progress=False)
    assert manifest.train.num_documents + manifest.held_out.num_documents == len(MODULES)
    assert find_manifest(data, tmp_path / "cache") is not None


def test_what_is_here_is_not_fetched_again(hub: Hub) -> None:
    assert main(["download", "wikitext"]) == 0
    before = sorted(hub.fetched)
    assert main(["download", "wikitext"]) == 0
    assert sorted(hub.fetched) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_is_stopped_continues_with_the_files_that_are_missing(
    number: signal.Signals, hub: Hub, tmp_path: Path
) -> None:
    first, second = (f"{FOLDER}/train-0000{part}-of-00002.parquet" for part in range(2))
    hub.stalled = second
    begun = start("wikitext")
    wait_until(lambda: hub.halfway.is_set() and downloaded(tmp_path) == [Path(first).name])
    begun.send_signal(number)
    _, said = begun.communicate()
    assert begun.returncode == (75 if number == signal.SIGINT else -signal.SIGKILL), said
    assert "Traceback" not in said
    with pytest.raises(ConfigError, match="is not whole: 1 of 2 files are missing; continue"):
        compose_config("data=wikitext").data.fingerprint()
    hub.stalled = None
    hub.resumed.set()
    assert main(["download", "wikitext"]) == 0
    assert (hub.fetched.count(first), hub.fetched.count(second)) == (1, 2)
    folder = tmp_path / "cache/datasets/wikitext"
    assert (folder / second).read_bytes() == hub.repositories[WIKITEXT][second]
    assert not list(folder.rglob("*.incomplete"))


def test_a_part_has_about_so_many_tokens_and_lies_within_a_larger_one(
    hub: Hub, tmp_path: Path
) -> None:
    assert main(["download", "wikitext", "--tokens", "40m"]) == 0
    part = downloaded(tmp_path)
    assert len(part) == 1
    assert compose_config("data=wikitext").data.fingerprint()
    assert main(["download", "wikitext"]) == 0
    assert set(part) < set(downloaded(tmp_path))
    assert len(hub.fetched) == 2


def test_data_elsewhere_are_named_by_their_path(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert main(["download", "wikitext", "--to", str(elsewhere)]) == 0
    assert f"data=wikitext data.path={elsewhere}\n" in capfd.readouterr().out
    assert compose_config("data=wikitext", f"data.path={elsewhere}").data.num_bytes() > 10**5


def test_weights_are_listed_with_their_sizes_and_then_fetched(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"1" * 99, "pytorch_model.bin": b"2" * 99}
    hub.repositories["org/small"] = files | {"original/consolidated.pth": b"3" * 99}
    assert main(["download", "--model", "org/small", "--to", str(tmp_path / "small")]) == 0
    said = capfd.readouterr().out
    assert said.index("GiB  model.safetensors") < said.index("org/small: 2 files")
    assert f"model=pretrained model.path={tmp_path / 'small'}" in said
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]


def refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command is refused with."""
    assert main(["download", *words]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_a_disk_without_room_is_found_before_anything_is_fetched(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.claimed[f"{FOLDER}/train-00001-of-00002.parquet"] = 2**60
    said = refused(["wikitext"], capfd)
    assert "GiB free, and 1.07e+09 GiB are still to come; free some, give --to" in said
    assert hub.fetched == []


def test_terms_that_are_not_accepted_are_said_with_where_to_accept_them(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.gated.add(WIKITEXT)
    said = refused(["wikitext"], capfd)
    page = f"{hub.address}/datasets/{WIKITEXT}"
    assert f"wants its terms accepted; accept them on {page}, then log in: hf auth login." in said


def test_a_hub_without_the_files_is_said_in_one_line(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "cc_news does not exist at" in refused(["cc_news"], capfd)
    assert "has no file train/*.jsonl.zst" in refused(["pile", "--id", WIKITEXT], capfd)


def test_without_a_network_the_line_names_the_ways_around(
    hub: Hub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = refused(["wikitext"], capfd)
    assert "HF_ENDPOINT=http://127.0.0.1:9 does not answer; set a mirror" in said
    assert "--from modelscope" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1" in refused(["wikitext"], capfd)


def test_a_download_that_breaks_off_is_one_line_and_the_same_command_continues(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.lost.add(f"{FOLDER}/train-00001-of-00002.parquet")
    assert main(["download", "wikitext"]) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert "broke off (" in said
    assert said.endswith("The same command continues.\n")
    hub.lost.clear()
    assert main(["download", "wikitext"]) == 0
    assert len(downloaded(tmp_path)) == 2


def test_modelscope_brings_the_same_files_by_its_own_library(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("modelscope_hub")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["download", "wikitext", "--from", "modelscope"]) == 0
    assert f"from {hub.address}/datasets/{WIKITEXT}" in capfd.readouterr().out
    assert len(downloaded(tmp_path)) == 2
    assert compose_config("data=wikitext").data.fingerprint()
    assert "does not exist at ModelScope" in refused(["c4", "--from", "modelscope"], capfd)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert "modelscope does not answer" in refused(["wikitext", "--from", "modelscope"], capfd)


@pytest.mark.skipif(importlib.util.find_spec("modelscope_hub") is not None, reason="it is here")
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = refused(["wikitext", "--from", "modelscope"], capfd)
    assert "pip install -c constraints.txt -e '.[modelscope]'" in said


def test_what_cannot_be_fetched_is_said_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert "is not in the catalogue; the nearest is wikitext" in refused(["wikitex"], capfd)
    assert "has no copy of Skylion007/openwebtext" in refused(
        ["openwebtext", "--from", "modelscope"], capfd
    )
    assert "is not one thing to fetch" in refused([], capfd)
    assert "has no weights on the hub" in refused(["--model", "llama_7b"], capfd)
