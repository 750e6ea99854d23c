"""What `python -m llmtrain.plan` answers: figures, exit codes, tables, and what it proposes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain import compose
from llmtrain.plan.__main__ import multirun, plan_command
from tests.conftest import SMALL, Command
from tests.test_compose import call

Said = tuple[int, str]
Planned = Callable[..., Said]

PROMISED = (
    "fits",
    "micro_batch",
    "grad_accum",
    "world_size",
    "zero_stage",
    "precision",
    "activation_checkpointing",
    "step_seconds",
    "total_hours",
    "num_parameters",
    "flops_per_token",
    "reasons",
)
PROMISED_OF_MEMORY = ("device_peak_gib", "host_peak_gib", "components")
TOO_LARGE = ["model=llama_7b", "hardware=rtx4090x1"]


@pytest.fixture
def planned(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Planned:
    """The plan command in this process: its exit code and what it printed."""

    def command(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["plan", f"cache_root={cache}", *words])
        code = compose.main(plan_command, "plan", "", multirun)
        said = capsys.readouterr()
        assert said.err == ""
        return code, said.out

    return command


def as_json(said: Said) -> Any:
    return json.loads(said[1])


def test_a_plan_that_fits_exits_0_and_one_that_does_not_exits_2(planned: Planned) -> None:
    code, table = planned("model=llama_125m", "hardware=h100x1")
    assert code == 0
    assert "does not fit" not in table
    code, table = planned(*TOO_LARGE)
    assert code == 2
    assert "does not fit" in table


@pytest.mark.parametrize(("words", "code"), [(["hardware=h100x1"], 0), (TOO_LARGE, 2)])
def test_json_holds_what_programs_ask_for(words: list[str], code: int, planned: Planned) -> None:
    said = planned(*words, "format=json")
    values = as_json(said)
    assert said[0] == code
    assert values["fits"] == (code == 0)
    assert all(values[name] is not None for name in PROMISED)
    assert all(values["memory"][name] is not None for name in PROMISED_OF_MEMORY)
    total = sum(values["memory"]["components"].values())
    peaks = values["memory"]["device_peak_gib"] + values["memory"]["host_peak_gib"]
    assert total == pytest.approx(peaks)


def test_a_grid_is_one_whole_row_a_point(planned: Planned) -> None:
    words = ["model=llama_125m,llama_7b", "hardware=h100x1,t4x1"]
    code, table = planned("-m", *words)
    head, *rows = table.splitlines()
    assert code == 0
    assert head.split()[:2] == ["point", "fits"]
    assert [row.split()[:3] for row in rows] == [
        ["model=llama_125m", "hardware=h100x1", "yes"],
        ["model=llama_125m", "hardware=t4x1", "yes"],
        ["model=llama_7b", "hardware=h100x1", "yes"],
        ["model=llama_7b", "hardware=t4x1", "no"],
    ]
    assert "GiB on a" in rows[-1]
    assert "…" not in table


def test_a_grid_of_which_nothing_fits_exits_2_and_says_why_in_json_too(planned: Planned) -> None:
    words = [*TOO_LARGE[:1], "hardware=t4x1,rtx4090x1", "train.global_batch=8,0"]
    said = planned("-m", *words, "format=json")
    points = as_json(said)
    assert said[0] == 2
    assert [point["fits"] for point in points] == [False] * 4
    assert points[0]["overrides"] == ["hardware=t4x1", "train.global_batch=8"]
    assert points[0]["refusal"]
    assert "train.global_batch=0 is below 1" in points[1]["error"]


def test_a_7b_model_on_one_80_gib_gpu_is_offloaded_and_8_bits_are_proposed(
    planned: Planned,
) -> None:
    # In a step of millions of tokens the host takes a small part, in a short one a large one.
    words = ["model=llama_7b", "hardware=a800x1", "mode=pretrain", "train.global_batch=8"]
    plan = as_json(planned(*words, "format=json"))
    assert (plan["fits"], plan["offload_optimizer"]) == (True, "cpu")
    (proposal,) = (p for p in plan["proposals"] if "optimizer=adamw8bit" in p["overrides"])
    assert proposal["total_hours"] < plan["total_hours"] / 1.2
    code, table = planned(*words)
    assert code == 0
    (line,) = (line for line in table.splitlines() if "optimizer=adamw8bit" in line)
    assert "times faster" in line


def test_what_is_proposed_for_a_run_that_does_not_fit_makes_it_fit(planned: Planned) -> None:
    words = ["model=qwen2_5_7b", "hardware=rtx4090x1", "mode=sft"]
    proposals = as_json(planned(*words, "format=json"))["proposals"]
    assert 1 <= len(proposals) <= 3
    for proposal in proposals:
        assert planned(*words, *proposal["overrides"])[0] == 0


def test_an_adapter_is_proposed_only_where_there_are_weights_to_adapt(planned: Planned) -> None:
    proposals = as_json(planned(*TOO_LARGE, "format=json"))["proposals"]
    assert not any("adapter" in word for each in proposals for word in each["overrides"])


def test_a_run_that_does_not_fit_is_refused_with_what_would(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: Command
) -> None:
    small = ["hardware=cpux1", "hardware.memory_gib=0.4", "train.activation_checkpointing=none"]
    words = command.words("run", *small, "train.seq_len=1024", "train.micro_batch=4")[3:]
    assert call(words, monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.startswith("model=llama_tiny needs ")
    assert "what fits: train.seq_len=" in said
    assert said.count("\n") == 1
    assert not command.runs()


def test_known_trades_are_found_or_better_ones(planned: Planned) -> None:
    on_four = as_json(planned("model=llama_3b", "hardware=a100_40gx4", "format=json"))
    assert on_four["fits"]
    assert on_four["zero_stage"] >= 2 or on_four["offload_optimizer"] == "none"
    experiment = ["experiment=llama_7b_v100_32gx6", "data=stdlib", "data.path=null"]
    on_six = as_json(planned(*experiment, "format=json"))
    assert (on_six["fits"], on_six["precision"], on_six["world_size"]) == (True, "fp16", 6)
    ranks_batch = on_six["micro_batch"] * on_six["grad_accum"] * on_six["world_size"]
    assert ranks_batch == on_six["global_batch"]


def test_a_named_7b_model_is_tuned_by_lora_on_a_24_gib_card(planned: Planned) -> None:
    words = ["model=qwen2_5_7b", "adapter=lora", "hardware=rtx4090x1", "mode=sft"]
    plan = as_json(planned(*words, "format=json"))
    assert (plan["fits"], plan["adapter"]) == (True, "lora")
    assert plan["memory"]["device_peak_gib"] > 2 * plan["num_parameters"] / 2**30


def test_a_dry_run_builds_the_first_batch_and_leaves_no_folder(command: Command) -> None:
    words = [*SMALL, "hardware=cpux1", "launcher=dry", "train.max_steps=3", "train.micro_batch=4"]
    ended = command.run(*words)
    assert ended.returncode == 0, ended.stderr
    assert "The first micro-batch: input_ids [4, 32]" in ended.stdout
    assert "Nothing was started" in ended.stdout
    assert not command.runs()


def test_what_a_plan_chooses_takes_as_long_when_it_is_asked_for(planned: Planned) -> None:
    """Mamba's many small operations keep the host busier than the GPU at the sizes traced."""
    words = ["model=mamba_1b", "hardware=a800x1", "format=json"]
    chosen = as_json(planned(*words))
    names = ("micro_batch", "activation_checkpointing")
    asked = as_json(planned(*words, *(f"train.{name}={chosen[name]}" for name in names)))
    assert asked["step_seconds"] == pytest.approx(chosen["step_seconds"], rel=1e-3)
    peak = chosen["memory"]["device_peak_gib"]
    assert asked["memory"]["device_peak_gib"] == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize("damage", ["", "{}", '{"samples": ['])
def test_a_damaged_cache_is_made_again(damage: str, planned: Planned, tmp_path: Path) -> None:
    words = ["model=llama_tiny", "hardware=h100x1", "format=json", f"cache_root={tmp_path}"]
    code, said = planned(*words)
    for file in [*tmp_path.glob("traces/*.json"), *tmp_path.glob("models/*.json")]:
        file.write_text(damage)
    assert planned(*words) == (code, said)


def test_json_has_null_where_a_figure_is_infinite(planned: Planned) -> None:
    words = ["hardware=a800x1", "hardware.price_per_hour=1e308", "train.max_tokens=1e18"]
    values = json.loads(planned(*words, "format=json")[1], parse_constant=pytest.fail)
    assert values["money"] is None
