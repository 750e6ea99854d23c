"""What a plan decides, and why."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.choose import choose_scan
from llmtrain.errors import ConfigError
from llmtrain.hardware import Gpu, known_peak, resolve, usable_gib, visible_gpus
from llmtrain.plan import Plan, make_plan
from llmtrain.throughput import flops_per_token, model_flops_utilisation
from tests.conftest import Command
from tests.test_compose import compose_config

Planner = Callable[..., Plan]


@pytest.fixture
def plan_of(cache: Path) -> Planner:
    def plan(*overrides: str) -> Plan:
        return make_plan(compose_config(f"cache_root={cache}", *overrides))

    return plan


def test_a_7b_model_on_one_80_gib_gpu_offloads_its_optimizer(plan_of: Planner) -> None:
    plan = plan_of("model=mamba_7b", "hardware=a800x1", "mode=pretrain")
    assert (plan.offload_optimizer, plan.precision, plan.world_size) == ("cpu", "bf16", 1)
    assert plan.tokens_per_step > 500_000
    assert plan.learning_rate < 1e-3
    assert any("FineWeb-Edu" in warning for warning in plan.warnings)


def test_a_7b_model_on_eight_80_gib_gpus_partitions_instead(plan_of: Planner) -> None:
    plan = plan_of("model=llama_7b", "hardware=a800x8")
    assert plan.offload_optimizer == "none"
    assert plan.zero_stage >= 1


def test_what_a_gpu_is_sent_is_pinned_on_the_host_in_powers_of_two(plan_of: Planner) -> None:
    """Masters and gradients of 25.1 GiB take 32 each, their copies in bf16 16; states are not."""
    offload = ("zero.stage=2", "zero.offload_optimizer=cpu", "optimizer=adamw")
    plan = plan_of("model=llama_7b", "hardware=a800x1", *offload)
    found = plan.memory["components"]
    assert found["host master copies"] == found["host gradients"] == 32
    assert 16 < found["host copies to send"] < 17  # and the largest weight's gradient
    assert found["host optimizer states"] == pytest.approx(8 * plan.num_parameters / 2**30)


def test_the_whole_model_has_to_fit_each_gpu_before_stage_3_partitions_it(plan_of: Planner) -> None:
    words = ("model=llama_7b", "hardware=a800x8", "train.micro_batch=1", "zero.stage=3")
    small = ("zero.offload_optimizer=cpu", "zero.offload_params=cpu", "hardware.memory_gib=12")
    few = ("train.activation_checkpointing=full", "train.seq_len=512")
    plan = plan_of(*words, *small, *few)
    whole = 2 * plan.num_parameters / 2**30
    assert plan.memory["moment"] == "building of the model"
    assert plan.memory["components"]["weights"] == pytest.approx(whole, 0.01)
    assert not plan.fits


def test_a_model_that_does_not_fit_has_a_plan_that_says_what_it_lacks(plan_of: Planner) -> None:
    plan = plan_of("model=llama_7b", "hardware=t4x1")
    assert not plan.fits
    assert re.fullmatch(
        r"[\d.]+ GiB on a (device of [\d.]+|host with [\d.]+ for it)", str(plan.refusal)
    )


def test_a_card_without_bf16_trains_in_fp16(plan_of: Planner) -> None:
    assert (
        plan_of("model=llama_125m", "hardware=v100_32gx6", "train.global_batch=96").precision
        == "fp16"
    )
    with pytest.raises(ConfigError, match="train.precision=bf16 does not exist on"):
        plan_of("model=llama_125m", "hardware=t4x1", "train.precision=bf16")


def test_the_batch_is_split_without_a_rest(plan_of: Planner) -> None:
    plan = plan_of("hardware=cpux2", "train.global_batch=12", "train.micro_batch=3")
    assert (plan.micro_batch, plan.grad_accum, plan.world_size) == (3, 2, 2)
    with pytest.raises(ConfigError, match="nearest are 96 and 128"):
        plan_of("hardware=a100x8", "train.global_batch=100", "train.micro_batch=4")


def test_more_nodes_are_more_ranks(plan_of: Planner) -> None:
    plan = plan_of("model=llama_7b", "hardware=a800x8", "hardware.num_nodes=4")
    assert plan.world_size == 32


def test_steps_tokens_and_epochs_are_one_horizon(plan_of: Planner) -> None:
    words = ["train.seq_len=128", "train.global_batch=8"]
    assert plan_of(*words, "train.max_steps=7").num_steps == 7
    assert plan_of(*words, "train.max_tokens=10240").num_steps == 10
    plan = plan_of(*words, "train.max_epochs=2")
    assert plan.num_tokens == pytest.approx(2 * plan.data.num_train_tokens, rel=1e-3)


def test_the_warm_up_is_a_twentieth_unless_asked_otherwise(plan_of: Planner) -> None:
    assert plan_of("train.max_steps=200").warmup_steps == 10
    assert plan_of("train.max_steps=200", "schedule.warmup_steps=3").warmup_steps == 3
    assert plan_of("train.max_steps=210", "schedule.warmup_fraction=0.1").warmup_steps == 21


def test_overriding_the_width_keeps_heads_and_feed_forward_whole(plan_of: Planner) -> None:
    wide = plan_of("model.config.hidden_size=512")
    assert wide.num_parameters > 3 * plan_of().num_parameters


def test_an_attention_that_cannot_load_is_refused(plan_of: Planner) -> None:
    with pytest.raises(ConfigError, match="model.attention=flash cannot load: .* take sdpa"):
        plan_of("model.attention=flash", "hardware=cpux1")
    assert plan_of("model.attention=sdpa", "hardware=cpux1").attention == "sdpa"


def test_flops_of_a_token_are_six_for_each_weight_and_causal_attention(plan_of: Planner) -> None:
    config = compose_config()
    facts = config.model.facts(Path(config.cache_root))
    weights = 6 * (4 * 256 * 256 + 3 * 256 * 704) + 256 * 4096  # layers and the tied head
    assert facts.num_matmul_parameters == weights
    assert flops_per_token(facts, 1) == 6 * weights + 12 * 6 * 256
    assert flops_per_token(facts, 101) - flops_per_token(facts, 1) == 12 * 6 * 256 * 50


def test_only_the_active_experts_count(plan_of: Planner) -> None:
    plan = plan_of("model=moe_tiny")
    assert plan.num_active_parameters < plan.num_parameters
    assert plan.flops_per_token < 6 * plan.num_parameters


def test_an_unknown_peak_gives_no_utilisation() -> None:
    assert model_flops_utilisation(1e3, 1e9, None) is None
    assert model_flops_utilisation(1e3, 1e9, 2.0) == 0.5


def test_the_plan_command_prints_a_table_or_json(command: Command) -> None:
    table = command.run("train.max_steps=3", "hardware=cpux1", module="plan")
    assert table.returncode == 0
    assert "3, each of 16 x 256 tokens" in table.stdout
    plan = json.loads(command.run("format=json", "hardware=cpux1", module="plan").stdout)
    assert plan.pop("proposals") == []
    assert json.loads(json.dumps(Plan.from_json(plan).to_json())) == plan
    for name in ("fits", "micro_batch", "grad_accum", "world_size", "zero_stage", "reasons"):
        assert name in plan
    assert not command.runs()


FAKE_SMI = """#!/bin/sh
if [ "$1" = -L ]; then
    echo "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-aaaa1111)"
    echo "GPU 1: NVIDIA GeForce RTX 4090 (UUID: GPU-bbbb2222)"
    echo "  MIG 3g.20gb     Device  0: (UUID: MIG-dddd4444)"
    echo "  MIG 1c.1g.10gb+me Device  1: (UUID: MIG-eeee5555)"
    exit
fi
echo "0, GPU-aaaa1111, NVIDIA GeForce RTX 4090, 24564, 8.9"
echo "1, GPU-bbbb2222, NVIDIA GeForce RTX 4090, 24564, 8.9"
echo "2, GPU-cccc3333, NVIDIA GeForce RTX 4090, 24564, 8.9"
"""


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi names three cards."""
    (tmp_path / "nvidia-smi").write_text(FAKE_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("chosen", "uuids"), [("2,0", "ca"), ("GPU-bbbb", "b"), ("", ""), ("-1", "")]
)
def test_cuda_visible_devices_is_honoured_by_number_and_by_uuid(
    chosen: str, uuids: str, three_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert "".join(gpu.uuid[4] for gpu in visible_gpus()) == uuids


@pytest.mark.parametrize(
    ("chosen", "profile", "gib"),
    [("MIG-dddd4444", "3g.20gb", 16.6), ("MIG-eeee5555,MIG-dddd4444", "1c.1g.10gb+me", 8.3)],
)
def test_a_slice_of_a_gpu_is_one_with_its_memory_and_no_known_rates(
    chosen: str, profile: str, gib: float, three_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    (found,) = visible_gpus()
    assert found.name.endswith(f"MIG {profile}") and found.memory_gib == pytest.approx(gib)
    assert known_peak(found.name)["bf16"] is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-ffff")
    with pytest.raises(ConfigError, match="names no GPU"):
        visible_gpus()


@pytest.mark.parametrize(
    ("name", "mib", "gib"),
    [
        ("NVIDIA GeForce RTX 4090", 24564, 23.6),
        ("NVIDIA GeForce RTX 4090", 49140, 49140 / 1024),  # one that was given more
        ("NVIDIA A800-SXM4-80GB", 81920, 79.1),
        ("Some card of next year", 24564, 24564 / 1024),
    ],
)
def test_a_known_card_has_the_memory_that_cuda_gives_of_it(name: str, mib: int, gib: float) -> None:
    assert usable_gib(Gpu("0", "GPU-a", name, mib / 1024, 8.9)) == gib


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", None),
        ("Some card of next year", None),
    ],
)
def test_only_the_card_itself_has_its_peak(name: str, bf16: float | None) -> None:
    assert known_peak(name)["bf16"] == bf16


def test_a_device_that_does_not_exist_is_refused(
    three_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=7 names no GPU"):
        visible_gpus()


def test_auto_takes_all_visible_gpus_and_knows_their_peak(
    plan_of: Planner, three_gpus: None
) -> None:
    plan = plan_of("hardware=auto", "train.global_batch=24")
    assert (plan.device, plan.world_size, plan.peak_tflops) == ("cuda", 3, 165.2)
    fewer = plan_of("hardware=auto", "hardware.gpus_per_node=2", "train.global_batch=24")
    assert fewer.world_size == 2


@pytest.mark.parametrize(
    ("model", "words", "kernel"),
    [
        ("mamba_1b", [], None),  # refused
        ("mamba_1b", ["model.kernels=chunked"], "chunked"),
        ("mamba_1b", ["model.kernels=reference"], "transformers"),
        ("mamba_130m", [], "chunked"),
        ("mamba2_1b", [], "transformers"),
    ],
)
def test_a_large_mamba_is_not_trained_on_a_gpu_without_a_compiled_scan(
    model: str, words: list[str], kernel: str | None, tmp_path: Path
) -> None:
    config = compose_config(f"model={model}", "hardware=rtx4090x1", *words)
    machine = replace(resolve(config.hardware), is_here=True)
    facts = config.model.facts(tmp_path)
    if kernel is None:
        with pytest.raises(ConfigError, match="a hundred times slower.*make install-cuda"):
            choose_scan(config.model, machine, facts, {})
    else:
        assert choose_scan(config.model, machine, facts, {}) == kernel
