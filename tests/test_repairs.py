"""The classic mistakes, each refused or told in one line before anything starts."""

import os
import shutil
import sys
import time
from functools import cache as once
from pathlib import Path

import pytest
import torch

from launchers.local import shared_environment
from llmtrain.checks import (
    check_compiler,
    check_interval,
    check_toolkit,
    check_vocabulary,
    seconds_left,
)
from llmtrain.choose import choose_precision, warn_of_precision
from llmtrain.data.shards import SHARDS
from llmtrain.data.tokenizer import vocabulary_at
from llmtrain.engine import build_model
from llmtrain.errors import ConfigError
from llmtrain.hardware import Machine, resolve
from llmtrain.nvme import check_nvme, disks_of
from llmtrain.optimizer import base
from llmtrain.plan import make_plan
from llmtrain.prepare import warn_of_tokenizer
from llmtrain.run import run
from tests.finished_models import Models
from tests.test_compose import compose_config

# peft asks transformers whether it recomputes by a name that it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

REFUSED = {
    "hardware=a100x8 train.global_batch=100 train.micro_batch=4": (
        "train.global_batch=100 is not a multiple of 8 ranks x micro_batch 4 = 32; "
        "nearest are 96 and 128."
    ),
    "hardware=a100x8 train.global_batch=5": (
        "train.global_batch=5 is not a multiple of 8 ranks x micro_batch 1 = 8; nearest is 8."
    ),
    "hardware=t4x1 model=llama_50m train.precision=bf16": (
        "train.precision=bf16 does not exist on T4; take fp16."
    ),
    "hardware=cpux1 train.precision=fp16": (
        "train.precision=fp16 has no kernels for training on a CPU; take bf16 or fp32."
    ),
    "hardware=cpux1 train.seq_len=2048": (
        "train.seq_len=2048 is longer than the model's 1024 positions; "
        "set train.seq_len=1024 or raise model.config.max_position_embeddings."
    ),
    "hardware=h100x8 model=gpt2 train.seq_len=2048": (
        "train.seq_len=2048 is longer than the model's 1024 positions; set train.seq_len=1024."
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def said_by(refused: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(refused.value)
    assert "\n" not in text
    return text


@once
def machine(name: str) -> Machine:
    return resolve(compose_config(f"hardware={name}").hardware)


def warned(model: str, hardware: str, *overrides: str) -> str:
    """What is said of the precision that is chosen or asked for."""
    config = compose_config(f"model={model}", *overrides)
    precision = choose_precision(config, machine(hardware), {})
    return " ".join(warn_of_precision(config.model, machine(hardware), precision))


@pytest.mark.parametrize("line", REFUSED)
def test_a_mistake_is_refused_with_its_remedy(line: str, cache: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        make_plan(compose_config(f"cache_root={cache}", *line.split()))
    assert said_by(refused) == REFUSED[line]


def test_more_ranks_than_devices_are_refused() -> None:
    launcher = compose_config().launcher
    launcher.check("cpu", 1000, 1)  # a process is a device
    with pytest.raises(ConfigError, match="hardware.gpus_per_node=1000 is more than the .* GPUs"):
        launcher.check("cuda", 1000, 1)


def test_a_model_saved_in_bf16_is_trained_in_fp16_with_a_warning() -> None:
    said = warned("qwen2_5_7b", "v100_32gx6")
    assert said.startswith("train.precision=fp16 ends at 65504, and model=qwen2_5_7b was saved in")
    assert said.endswith("take train.precision=fp32.")
    asked = warned("qwen2_5_7b", "a800x1", "train.precision=fp16")
    assert asked.endswith("take train.precision=bf16.")
    assert warned("qwen2_5_7b", "a800x1") == warned("llama_7b", "v100_32gx6") == ""


def test_a_model_saved_in_fp16_is_trained_in_bf16_with_a_warning() -> None:
    said = warned("llama2_7b", "a800x1")
    assert said.startswith("train.precision=bf16 keeps 8 of the 11 bits in which model=llama2_7b")
    assert warned("llama2_7b", "v100_32gx6") == warned("gpt2", "a800x1") == ""


def test_a_folder_says_itself_how_it_was_saved(models: Models) -> None:
    folder = models.save("mamba", hidden_size=32, num_hidden_layers=1, state_size=8)
    model = compose_config("model=pretrained", f"model.path={folder}").model
    assert model.saved_dtype == "float32"


def test_weights_that_fp16_cannot_hold_are_refused(models: Models) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models.llama, dtype=torch.bfloat16)
    model.lm_head.weight.data[3, 4] = 1e5
    model.save_pretrained(models.root / "large")
    part = compose_config("model=pretrained", f"model.path={models.root / 'large'}").model
    with pytest.raises(ConfigError) as refused:
        part.build(torch.float16, "eager")
    assert "train.precision=fp16 cannot hold lm_head.weight of" in said_by(refused)
    assert part.build(torch.bfloat16, "eager").lm_head.weight[3, 4] > 65504


@pytest.mark.parametrize("adapter", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_adapter_has_the_dtype_that_its_base_is_multiplied_in(
    adapter: str, precision: str, models: Models, cache: Path
) -> None:
    words = ["mode=sft", "data=chat", f"data.path={models.chat_rows}", "hardware=cpux1"]
    words += ["model=pretrained", f"model.path={models.llama}", "train.seq_len=64"]
    words += [f"adapter={adapter}", f"train.precision={precision}", f"cache_root={cache}"]
    config = compose_config(*words)
    vocabulary = vocabulary_at(str(models.llama), "model.path", cache)
    model = build_model(config, make_plan(config), vocabulary)
    dtypes = {param.dtype for param in model.parameters() if param.requires_grad}
    bases = {param.dtype for param in model.parameters() if not param.requires_grad}
    assert dtypes == bases == {{"bf16": torch.bfloat16, "fp32": torch.float32}[precision]}


def test_a_tokenizer_larger_than_the_embedding_is_refused(models: Models, cache: Path) -> None:
    from llmtrain.data.shards import prepare

    words = ["data=text", f"data.path={models.texts}", "data.held_out_every=4"]
    config = compose_config(*words, "model.config.vocab_size=257", f"cache_root={cache}")
    manifest = prepare(config.data, cache, str(models.llama), progress=False)
    facts = config.model.facts(cache)
    with pytest.raises(ConfigError) as refused:
        check_vocabulary(config, facts, manifest)
    assert said_by(refused) == (
        f"model.config.vocab_size=257 is smaller than the tokenizer's {manifest.vocabulary.size} "
        "entries; set it to 320 or take a smaller tokenizer."
    )
    stored = compose_config("model=pretrained", f"model.path={models.llama}")
    with pytest.raises(ConfigError, match="give the weights' own tokenizer"):
        check_vocabulary(stored, facts, manifest)


def test_a_given_tokenizer_that_is_too_large_is_refused_before_text_is_read_for_it(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data=text", f"data.path={models.texts}", f"data.tokenizer.path={models.llama}"]
    words += ["model.config.vocab_size=257", f"cache_root={tmp_path}", "hardware=cpux1"]
    with pytest.raises(ConfigError) as refused:
        run(compose_config(*words, f"output_root={tmp_path / 'outputs'}"))
    assert said_by(refused).startswith("model.config.vocab_size=257 is smaller than the tokenizer")
    assert not (tmp_path / SHARDS).exists() and not (tmp_path / "outputs").exists()
    warn_of_tokenizer(compose_config(*words))
    assert capsys.readouterr().err.endswith(f"warning: {said_by(refused)}\n")


def offloading(path: Path | str | None, needed_gib: float = 0.1) -> list[str]:
    return check_nvme(None if path is None else str(path), needed_gib)


def test_offload_to_a_folder_that_is_not_given_not_there_or_full_is_refused(
    tmp_path: Path,
) -> None:
    free_gib = shutil.disk_usage(tmp_path).free / 2**30
    for path, needed_gib, reason in (
        (None, 0.1, "zero.nvme_path=null is needed to offload to nvme"),
        ("/no/such/disk", 0.1, "zero.nvme_path=/no/such/disk is no folder of this machine"),
        (tmp_path, free_gib + 1000, f"zero.nvme_path={tmp_path} has "),
    ):
        with pytest.raises(ConfigError) as refused:
            offloading(path, needed_gib)
        assert reason in said_by(refused)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_offload_to_a_folder_of_someone_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero.nvme_path=/proc cannot be written"):
        offloading("/proc")


def test_offload_to_memory_is_told_to_be_slow() -> None:
    said = offloading("/dev/shm", 0.001)
    assert said == [
        "zero.nvme_path=/dev/shm lies on no disk of its own (memory or network), "
        "not on an NVMe: every step waits for it."
    ]


def test_an_nvme_is_recognised_below_a_volume(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    blocks, volume = tmp_path / "block", tmp_path / "devices" / "dm-0"
    for disk in ("nvme0n1p1", "nvme1n1p1"):
        (tmp_path / "devices" / disk).mkdir(parents=True)
        (volume / "slaves").mkdir(parents=True, exist_ok=True)
        (volume / "slaves" / disk).symlink_to(tmp_path / "devices" / disk)
    blocks.mkdir()
    (blocks / f"{os.major(number)}:{os.minor(number)}").symlink_to(volume)
    assert disks_of(tmp_path, blocks) == ["nvme0n1p1", "nvme1n1p1"]


def test_offload_to_nvme_without_libaio_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c++").write_text("#!/bin/sh\nexit 1\n")  # a compiler that finds no libaio
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as refused:
        check_compiler(compose_config(), "none", "nvme")
    assert said_by(refused) == (
        "zero.offload_params=nvme needs libaio and its header, which are not found; "
        "run: apt-get install libaio-dev, or take cpu."
    )


def test_what_is_compiled_for_a_gpu_is_refused_without_nvcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "USUAL_NVCC", tmp_path / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    lion = compose_config("optimizer=lion")
    with pytest.raises(ConfigError, match="^optimizer=lion is compiled for the GPU, and no CUDA"):
        check_toolkit(lion, "none", "none")
    check_toolkit(lion, "cpu", "none")
    with pytest.raises(ConfigError, match="^zero.offload_params=nvme is compiled for the GPU"):
        check_toolkit(compose_config(), "cpu", "nvme")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    check_toolkit(lion, "none", "nvme")


def test_ranks_find_the_programs_of_their_environment_also_if_it_was_not_activated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/bin")
    assert shared_environment(1)["PATH"] == f"{Path(sys.executable).parent}:/bin"


def test_a_checkpoint_later_than_the_end_of_the_job_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        check_interval(every=500, num_steps=10_000, step_seconds=20, limit_seconds=3600)
    assert said_by(refused) == (
        "checkpoint.every=500 takes 2.8 h, and this job ends in 1 h: nothing would be kept; "
        "set it to at most 90."
    )
    check_interval(every=100, num_steps=10_000, step_seconds=20, limit_seconds=3600)
    check_interval(every=500, num_steps=50, step_seconds=20, limit_seconds=3600)
    check_interval(every=500, num_steps=10_000, step_seconds=20, limit_seconds=None)


def test_the_time_that_a_slurm_job_has_left_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert seconds_left() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert 3500 < (seconds_left() or 0) <= 3600
