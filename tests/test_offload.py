"""State that lies on the host or on a disk: the same losses, before a checkpoint and after it."""

from pathlib import Path

import pytest

from llmtrain.errors import ConfigError
from llmtrain.offloading import check_weights_on_disk, links_libaio, require_libaio
from tests.conftest import SMALL, Command
from tests.test_train import Bench

RUN = ["optimizer=adamw", "optimizer.lr=5e-3", "train.max_steps=4", "train.micro_batch=2"]
ON_HOST = [
    "zero.stage=1 zero.offload_optimizer=cpu",
    "zero.stage=2 zero.offload_optimizer=cpu",
    "zero.stage=3 zero.offload_optimizer=cpu",
    "zero.stage=3 zero.offload_optimizer=cpu zero.offload_params=cpu",
]
ON_DISK = [
    "zero.stage=3 zero.offload_optimizer=nvme zero.offload_params=cpu",
    "zero.stage=3 zero.offload_optimizer=nvme zero.offload_params=nvme",
]
# Half of a matrix has 1 MiB in 16 bits: DeepSpeed keeps less than that in memory.
LARGE = ["model.config.hidden_size=1024", "model.config.head_dim=64"]


@pytest.fixture
def bench(command: Command) -> Bench:
    return Bench(command)


def test_what_lies_on_the_host_trains_and_continues_alike(bench: Bench) -> None:
    words = [*SMALL, *RUN, "hardware=cpux1", "train.precision=fp32"]
    bench.add("plain", "curve", *words, "zero.stage=0")
    for number, spread in enumerate(ON_HOST):
        bench.add(f"spread{number}", "save_and_continue", *words, *spread.split())
    plain, *others = bench.run(1)
    for losses, spread in zip(others, ON_HOST, strict=True):
        assert losses == pytest.approx(plain, rel=1e-3), spread


@pytest.mark.skipif(not links_libaio(), reason="needs libaio: apt-get install libaio-dev")
def test_what_lies_on_a_disk_trains_and_continues_alike(bench: Bench, tmp_path: Path) -> None:
    words = [*SMALL, *LARGE, *RUN, "hardware=cpux2", "train.precision=bf16"]
    words += ["model.config.num_hidden_layers=1", "train.activation_checkpointing=full"]
    disk = tmp_path / "disk"
    disk.mkdir()
    bench.add("plain", "curve", *words, "zero.stage=3")
    for number, spread in enumerate(ON_DISK):
        where = [*spread.split(), f"zero.nvme_path={disk}"]
        bench.add(f"spread{number}", "save_and_continue", *words, *where)
    plain, *others = bench.run(2)
    for losses, spread in zip(others, ON_DISK, strict=True):
        assert losses == pytest.approx(plain, rel=1e-3), spread
    assert list(disk.rglob("*_param.tensor.swp"))
    assert list(disk.rglob("exp_avg*.swp"))


def test_a_machine_without_libaio_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="zero.offload_params=nvme needs libaio"):
        require_libaio("zero.offload_params")


@pytest.mark.parametrize(("ranks", "precision"), [(1, "bf16"), (2, "fp32")])
def test_weights_on_a_disk_are_refused_where_they_would_be_read_wrong(
    ranks: int, precision: str
) -> None:
    with pytest.raises(ConfigError, match="zero.offload_params=nvme"):
        check_weights_on_disk("cpu", ranks, precision)
