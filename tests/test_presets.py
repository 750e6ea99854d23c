"""The shipped models and machines are what their names and datasheets say."""

import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parent.parent / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
SHAPED = [name for name in MODELS if name != "pretrained"]
OURS = [name for name in SHAPED if "hub" not in OmegaConf.load(CONF / "model" / f"{name}.yaml")]
SIZED = [name for name in OURS if not name.endswith("_tiny")]
HARDWARE = sorted(path.stem for path in (CONF / "hardware").glob("*.yaml"))
CARDS = sorted(path.stem for path in (CONF / "hardware" / "card").glob("*.yaml"))
CARDED = [name for name in HARDWARE if name != "auto" and not name.startswith("cpu")]
NAMED = [("model", name) for name in MODELS] + [("hardware", name) for name in HARDWARE]
TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer's to say
SOLD_GIB = {
    "a100_40g": 40,
    "a100_80g": 80,
    "a800": 80,
    "h100": 80,
    "h200": 141,
    "rtx3090": 24,
    "rtx4090": 24,
    "t4": 16,
    "v100_16g": 16,
    "v100_32g": 32,
}
UNITS = {"m": 1e6, "b": 1e9}


def values(group: str, name: str) -> dict[str, Any]:
    """The values of one preset, with those of the presets that its defaults point to."""
    loaded = OmegaConf.load(CONF / group / f"{name}.yaml")
    own: dict[str, Any] = OmegaConf.to_container(loaded)  # type: ignore[assignment]
    entries = [entry for entry in own.pop("defaults") if isinstance(entry, str)]
    parents = [entry.partition("@")[0] for entry in entries]
    folder = f"{group}/{name}".rpartition("/")[0]
    inherited: dict[str, Any] = {}
    for parent in parents:
        if parent != "_self_" and not parent.startswith("/schema/"):
            inherited |= values(folder, parent)
    return inherited | own


@cache
def parameters(name: str) -> tuple[int, int]:
    """(total, active) parameters of a model preset, counted without memory for them."""
    from transformers import CONFIG_MAPPING

    from llmtrain.model.facts import count_parameters, on_meta
    from llmtrain.model.keywords import complete_config

    preset = values("model", name)
    config = complete_config(preset["architecture"], preset["config"])
    counted = count_parameters(on_meta(CONFIG_MAPPING[preset["architecture"]](**config)))
    return counted.total, counted.active


def sizes(name: str) -> list[tuple[float, float]]:
    """(number, unit) of each size in a name: moe_1b_7b has (1, 1e9) and (7, 1e9)."""
    return [(float(number), UNITS[unit]) for number, unit in re.findall(r"_(\d+)([mb])", name)]


@pytest.mark.parametrize("name", SHAPED)
def test_every_keyword_of_a_model_exists_in_its_config_class(name: str) -> None:
    from transformers import CONFIG_MAPPING

    preset = values("model", name)
    known = {item.name for item in fields(CONFIG_MAPPING[preset["architecture"]])}
    assert set(preset["config"]) <= known - TOKEN_IDS


@pytest.mark.parametrize("name", SIZED)
def test_a_model_has_as_many_parameters_as_its_name_says(name: str) -> None:
    total, active = parameters(name)
    counts = [total] if len(sizes(name)) == 1 else [active, total]
    for count, (number, unit) in zip(counts, sizes(name), strict=True):
        assert round(count / unit) == number


@pytest.mark.parametrize("name", ["llama_1b", "mamba_1b", "mamba2_1b"])
def test_a_dense_1b_model_is_within_5_percent_of_a_billion(name: str) -> None:
    assert parameters(name)[0] == pytest.approx(1e9, rel=0.05)


@pytest.mark.parametrize("name", [name for name in SHAPED if name.endswith("_tiny")])
def test_a_tiny_model_has_at_most_10_million_parameters(name: str) -> None:
    assert parameters(name)[0] < 10e6


@pytest.mark.parametrize("name", SIZED)
def test_a_recipe_gives_each_active_parameter_about_20_tokens(name: str) -> None:
    tokens = values("model", name)["recipe"]["max_tokens"]
    assert tokens / parameters(name)[1] == pytest.approx(20, rel=0.06)


@pytest.mark.parametrize("name", SHAPED)
def test_a_recipe_fits_the_positions_of_its_model(name: str) -> None:
    preset = values("model", name)
    names = {"max_position_embeddings", "n_positions"} & set(preset["config"])
    assert all(preset["recipe"]["seq_len"] <= preset["config"][name] for name in names)


@pytest.mark.parametrize(("group", "name"), NAMED)
def test_a_preset_is_named_as_its_file(group: str, name: str) -> None:
    assert values(group, name)["name"] == name


@pytest.mark.parametrize("name", CARDED)
def test_the_figures_of_a_machine_are_positive_numbers(name: str) -> None:
    machine = values("hardware", name)
    figures = {**machine, **machine["peak_tflops"]}
    unstated = {key for key, value in figures.items() if value is None}
    numbers = [value for value in figures.values() if isinstance(value, int | float)]
    assert unstated <= {"bf16", "price_per_hour"}
    assert len(numbers) >= 8
    assert min(numbers) > 0


@pytest.mark.parametrize("name", CARDED)
def test_the_figures_of_a_machine_agree_with_each_other(name: str) -> None:
    machine = values("hardware", name)
    peak = machine["peak_tflops"]
    assert machine["device"] == "cuda"
    assert name.endswith(f"x{machine['gpus_per_node']}")
    assert machine["memory_bandwidth"] > machine["link_bandwidth"] >= machine["host_link_bandwidth"]
    assert peak["fp32"] < peak["fp16"]
    assert peak["bf16"] in (peak["fp16"], None)


@pytest.mark.parametrize("card", CARDS)
def test_a_card_offers_a_little_less_memory_than_it_is_sold_with(card: str) -> None:
    assert 0.9 * SOLD_GIB[card] < values("hardware/card", card)["memory_gib"] < SOLD_GIB[card]


@pytest.mark.parametrize("card", CARDS)
def test_a_card_is_read_without_its_parents_too(card: str) -> None:
    own: Any = OmegaConf.load(CONF / "hardware" / "card" / f"{card}.yaml")
    assert {"product", "peak_tflops"} <= set(own)  # `auto` looks up a visible card's peak here
