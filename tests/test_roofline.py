"""What a step's operations cost, and at which rates."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtrain.calibration import HEADS, PRODUCTS
from llmtrain.hardware import Device, Hardware, Machine, resolve
from llmtrain.rates import Rates, calibrated, datasheet
from llmtrain.roofline import (
    OpCounter,
    Row,
    StepWork,
    cost_of,
    seconds_of,
    step_seconds,
    weighted,
)
from tests.test_compose import compose_config

LARGE = 8192
WORK = StepWork(
    grad_accum=4,
    world_size=8,
    zero_stage=1,
    offload_optimizer="none",
    offload_params="none",
    num_trainable=10**9,
    num_weights=10**9,
    num_tensors=200,
    weight_bytes=2,
    has_master=True,
    state_bytes=8.0,
)


def machine_of(name: str, *overrides: str) -> Machine:
    machine: Machine = resolve(compose_config(f"hardware={name}", *overrides).hardware)
    return machine


def rates_of_preset(name: str) -> Rates:
    rates = datasheet(machine_of(name))
    assert rates is not None
    return rates


def counted(num_layers: int) -> list[Row]:
    """Operations of small layers with attention, forward and backward."""
    import torch
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            counter.see(func, args, kwargs or {}, out)
            return out

    counter = OpCounter()
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    values = torch.randn(2, 32, 64, requires_grad=True)
    with Counting():
        output = values
        for _ in range(num_layers):
            output = layer(output)
        output.sum().backward()
    return counter.rows()


def test_products_are_counted_as_torch_counts_them() -> None:
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    with FlopCounterMode(display=False) as expected:
        layer(torch.randn(2, 32, 64, requires_grad=True)).sum().backward()
    products = sum(row.times * row.flops for row in counted(1) if row.kind == "product")
    assert products == expected.get_total_flops()  # it knows no attention of a CPU


def test_fused_attention_is_counted_by_its_scores() -> None:
    rows = [row for row in counted(1) if row.kind.startswith("attention")]
    scores = 2 * 4 * 32 * 32
    assert {row.kind: row.flops for row in rows} == {
        "attention": 4 * scores * 16,
        "attention_backward": 10 * scores * 16,
    }


def test_rows_go_through_json() -> None:
    rows, rates = counted(1), rates_of_preset("a100x8")
    assert seconds_of(json.loads(json.dumps(rows)), rates) == seconds_of(rows, rates)


def test_two_layers_tell_how_long_five_take() -> None:
    one, two, rates = counted(1), counted(2), rates_of_preset("a100x8")
    five = [*weighted(one, -3), *weighted(two, 4)]
    assert seconds_of(five, rates) == pytest.approx(seconds_of(counted(5), rates))


def test_a_large_product_attains_most_of_a_gpus_peak() -> None:
    flops = 2.0 * LARGE**3
    seconds = rates_of_preset("a100x8").seconds("product", "bf16", flops, 6.0 * LARGE**2)
    assert 0.6 < flops / seconds / 312e12 < 0.8


def test_small_operations_wait_for_the_host_to_launch_them() -> None:
    rates = rates_of_preset("a100x8")
    rows = [Row("add", "bf16", 0.0, 1000.0, 1000)]
    assert seconds_of(rows, rates) == pytest.approx(1000 * rates.host_seconds)


@pytest.mark.parametrize(
    ("slower", "faster"),
    [("v100_32gx6", "a100_40gx4"), ("a100_40gx4", "h100x8"), ("t4x1", "rtx4090x1")],
)
def test_a_better_gpu_is_faster(slower: str, faster: str) -> None:
    rows = [Row("product", "fp16", 1e12, 1e9, 100), Row("silu", "fp16", 0.0, 1e9, 100)]
    assert seconds_of(rows, rates_of_preset(faster)) < seconds_of(rows, rates_of_preset(slower))


def test_gradients_cost_more_over_pcie_than_over_nvlink() -> None:
    slow, fast = rates_of_preset("rtx4090x8"), rates_of_preset("a100x8")
    assert step_seconds(0.01, WORK, slow) > 2 * step_seconds(0.01, WORK, fast)


@pytest.mark.parametrize(
    ("cheap", "dear"),
    [
        ({"zero_stage": 1}, {"zero_stage": 2}),
        ({"zero_stage": 2}, {"zero_stage": 3}),
        ({"offload_optimizer": "none"}, {"offload_optimizer": "cpu"}),
        ({"offload_optimizer": "cpu"}, {"offload_optimizer": "nvme"}),
        ({"hidden": ()}, {"hidden": ((4096, 4096),) * 60}),
    ],
)
def test_what_saves_memory_or_learns_faster_takes_time(
    cheap: dict[str, Any], dear: dict[str, Any]
) -> None:
    rates = rates_of_preset("a800x8")
    before, after = (step_seconds(0.01, replace(WORK, **part), rates) for part in (cheap, dear))
    assert after > before


def test_a_run_costs_what_its_devices_cost() -> None:
    cost = cost_of(10.0, machine_of("a100x8", "hardware.price_per_hour=1.5"))
    assert cost.gpu_hours == 80
    assert cost.money == 120
    assert cost.energy_kwh is not None
    assert 0.5 * 32 < cost.energy_kwh < 32  # 400 W each


def test_what_is_not_known_of_a_cost_is_not_made_up() -> None:
    cost = cost_of(10.0, resolve(Hardware(device=Device.cpu, gpus_per_node=2)))
    assert (cost.gpu_hours, cost.energy_kwh, cost.money) == (20, None, None)


def test_a_gpu_of_unknown_bandwidth_has_no_rates() -> None:
    assert datasheet(replace(machine_of("a100x8"), memory_bandwidth=None)) is None


def test_what_a_gpu_is_measured_with_takes_it_long_beside_a_launch() -> None:
    """Else a card that no preset knows would have the rates of launches, 5 us each."""
    flops_per_second = 1e12 * (machine_of("h100x1").peak_tflops["bf16"] or 0)
    longest = max(2.0 * batch * m * k * n for batch, m, k, n in PRODUCTS["cuda"])
    assert longest / flops_per_second > 20 * 5e-6
    scores = [batch * heads * length**2 * width for batch, heads, length, width in HEADS["cuda"]]
    assert max(4.0 * count for count in scores) / flops_per_second > 10 * 5e-6


def test_this_machine_is_measured_once(tmp_path: Path) -> None:
    machine = resolve(Hardware(device=Device.cpu, gpus_per_node=2))
    first = calibrated(machine, tmp_path)
    (path,) = (tmp_path / "rates").iterdir()
    stored = json.loads(path.read_text()) | {"was_busy": False}
    path.write_text(json.dumps(stored))
    rows = counted(1)
    assert calibrated(machine, tmp_path).lines.keys() == first.lines.keys()
    assert json.loads(path.read_text()) == stored
    assert 0 < seconds_of(rows, first) < seconds_of(weighted(rows, 2), first)
    assert first.moving("all_reduce", 1e6) > 0
