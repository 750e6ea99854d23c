"""What other trainers' settings become, and that none of them is lost in silence."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.compose import composed
from llmtrain.config import RunConfig
from llmtrain.migrate.__main__ import format_of, main, read
from llmtrain.migrate.correspondence import is_off
from tests.conftest import ROOT

FILES = Path(__file__).parent / "files"
EXAMPLES = sorted(path.name for path in FILES.iterdir())


class Migrated:
    """An experiment made in a folder of its own, and what was said about it."""

    def __init__(self, folder: Path, file: Path, said: str) -> None:
        self.folder, self.said = folder, said
        self.name = re.sub(r"\W+", "_", file.stem)
        self.text = (folder / "experiment" / f"{self.name}.yaml").read_text()

    def config(self, *words: str) -> RunConfig:
        """The typed config that the experiment composes to."""
        return composed(
            [f"hydra.searchpath=[file://{self.folder}]", f"experiment={self.name}", *words]
        )


@pytest.fixture
def migrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Migrate a file, or values, into an experiment."""

    def done(source: str | dict[str, Any], *words: str) -> Migrated:
        file = FILES / str(source)
        if isinstance(source, dict):
            file = tmp_path / "given.json"
            file.write_text(json.dumps(source))
        name = re.sub(r"\W+", "_", file.stem)
        out = tmp_path / "mine" / "experiment" / f"{name}.yaml"
        assert main([str(file), "--out", str(out), *words]) == 0, capsys.readouterr().err
        return Migrated(tmp_path / "mine", file, capsys.readouterr().out)

    return done


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a migration that is refused."""
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_composes_and_says_what_becomes_of_each_of_its_keys(
    name: str, migrate: Any
) -> None:
    made = migrate(name)
    made.config()
    assert "is not known" not in made.said
    form = format_of(read(FILES / name), FILES / name)
    for key, value in leaves(read(FILES / name)):
        usual = form.defaults.get(key, form.unsaid.get(key))
        if not (is_off(value) or value == usual):
            assert key in made.text or key in made.said, f"{key} of {name} is lost"


def leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Each value with its dotted key; options of a library are told together."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict) and not name.endswith(("_config", "_kwargs")):
            found += leaves(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def test_a_llama_factory_file_becomes_the_same_training(migrate: Any) -> None:
    made = migrate("factory_lora.yaml", "--num-processes", "4")
    config = made.config()
    assert config.name == "factory_lora"
    assert (config.model.path, config.model.trust_remote_code) == ("mine/small-4b", True)
    assert (config.mode.kind, config.data.kind, config.adapter.kind) == ("sft", "chat", "lora")
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (4, 8, 0)
    assert config.train.global_batch == 2 * 6 * 4
    assert (config.train.seq_len, config.train.max_epochs) == (1536, 2)
    assert config.train.precision is not None and config.train.precision.value == "bf16"
    assert (config.train.log_every, config.train.eval_every) == (5, 250)
    assert config.checkpoint.every == 200
    assert config.optimizer.lr == 2e-4
    assert config.schedule.warmup_fraction == 0.2
    assert config.data.validation_fraction == 0.15
    assert "max_samples=300" in made.said
    assert "data.path=<rows of answers>" in made.said


def test_what_a_trainer_takes_for_a_missing_key_is_taken_over(migrate: Any) -> None:
    config = migrate("factory_lora.yaml").config()
    assert (config.optimizer.kind, config.optimizer.weight_decay) == ("adamw", 0)
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.999)
    assert config.train.grad_clip == 1.0
    assert (config.schedule.kind, config.schedule.final_factor) == ("cosine", 0)
    assert config.data.packing is False
    assert config.seed == 42


def test_a_deepspeed_file_beside_is_read_with_the_file_that_names_it(migrate: Any) -> None:
    config = migrate("factory_lora_zero3.yaml").config()
    assert config.zero.stage == 3
    offload = config.zero.offload_optimizer, config.zero.offload_params
    assert [place.value for place in offload if place is not None] == ["cpu", "cpu"]
    assert config.adapter.target_modules == ["q_proj", "v_proj"]


def test_a_llama_factory_pretraining_learns_whole_texts(migrate: Any) -> None:
    config = migrate("factory_pretrain.yaml").config()
    assert (config.mode.kind, config.data.kind, config.adapter.kind) == ("pretrain", "text", "none")
    assert (config.train.max_steps, config.train.max_epochs) == (700, None)
    assert config.train.precision is not None and config.train.precision.value == "bf16_pure"
    assert config.data.held_out_every == 20


def test_rows_are_found_through_the_catalogue_beside_the_data(tmp_path: Path, migrate: Any) -> None:
    (tmp_path / "data").mkdir()
    catalogue = {"own": {"file_name": "own.json"}, "stored": {"hf_hub_url": "mine/rows"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(catalogue))
    given = {"model_name_or_path": "mine/model", "stage": "sft"}
    config = migrate(given | {"dataset": "own", "eval_dataset": "stored"}).config()
    assert config.data.path == str(tmp_path / "data" / "own.json")
    assert config.data.validation_path == "mine/rows"


def test_an_axolotl_file_becomes_the_same_training(migrate: Any) -> None:
    made = migrate("axolotl_lora.yml")
    config = made.config()
    assert config.model.path == "mine/small-1b"
    assert config.model.attention.value == "flash"
    assert (config.data.path, config.data.packing) == ("mine/answers", True)
    assert config.data.validation_fraction == 0.1
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("lora", 8, 24)
    assert config.adapter.target_modules == ["gate_proj", "q_proj"]
    assert (config.optimizer.kind, config.optimizer.lr) == ("adamw8bit", 3e-4)
    assert (config.train.global_batch, config.train.seq_len) == (6, 1024)
    assert config.train.precision is None
    assert config.train.activation_checkpointing == "full"
    assert config.schedule.warmup_steps == 10
    assert "loss_watchdog_threshold=5" in made.said


def test_four_bit_weights_and_fsdp_become_qlora_and_zero(migrate: Any) -> None:
    config = migrate("axolotl_qlora_fsdp.yaml").config()
    assert (config.adapter.kind, config.adapter.target_modules) == ("qlora", "auto")
    assert config.zero.stage == 3
    assert config.zero.offload_params is not None and config.zero.offload_params.value == "cpu"
    assert config.schedule.warmup_fraction == 0.03


def test_columns_and_splits_that_nobody_reads_are_named(migrate: Any) -> None:
    made = migrate("axolotl_full.yaml")
    assert made.config().adapter.kind == "none"
    for key in ("split", "field_messages", "message_property_mappings"):
        assert f"datasets[0].{key}=" in made.said
    assert "special_tokens.eos_token" in made.said


def test_a_deepspeed_file_gives_zero_precision_and_schedule(migrate: Any) -> None:
    made = migrate("zero2_whole.json")
    config = made.config()
    assert config.model.name == "llama_tiny"  # of which such a file says nothing
    assert (config.zero.stage, config.train.global_batch, config.train.grad_clip) == (2, 24, 0.7)
    assert config.zero.offload_optimizer is not None
    assert config.zero.offload_optimizer.value == "cpu"
    assert config.train.precision is not None and config.train.precision.value == "fp16"
    adamw = config.optimizer
    assert (adamw.kind, adamw.lr, adamw.beta1, adamw.beta2) == ("adamw", 3e-5, 0.8, 0.99)
    assert (config.schedule.kind, config.schedule.warmup_steps) == ("linear", 50)
    assert config.train.max_steps == 900
    assert "there as a logarithm" in made.said
    assert "experiment=zero2_whole model=<model> data=<data>" in made.said


def test_the_arguments_of_the_installed_trainer_are_all_known(migrate: Any, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    asked = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=7e-5,
        max_steps=60,
        warmup_steps=6,
        lr_scheduler_type="constant_with_warmup",
        optim="adafactor",
        label_smoothing_factor=0.1,
        use_cpu=True,
        report_to="none",
    )
    made = migrate(json.loads(asked.to_json_string()))
    config = made.config()
    assert "is not known" not in made.said
    assert (config.train.global_batch, config.train.max_steps) == (8, 60)
    assert (config.schedule.kind, config.schedule.warmup_steps) == ("constant", 6)
    assert (config.optimizer.kind, config.optimizer.lr) == ("adafactor", 7e-5)
    without = made.said.partition("Without a counterpart")[2].partition("Not taken over")[0]
    assert "label_smoothing_factor=0.1" in without
    assert without.count("=") < 12  # what was asked for, and not all that such a file holds


def test_nothing_but_defaults_says_nothing_but_what_differs(migrate: Any) -> None:
    made = migrate({"per_device_train_batch_size": 8, "ddp_timeout": 1800, "log_level": "passive"})
    assert "Without a counterpart" not in made.said
    assert "Not taken over" not in made.said


@pytest.mark.parametrize(
    ("given", "key", "ours"),
    [
        ({"lr_scheduler_type": "cosine_with_restarts"}, "schedule.kind", "cosine"),
        ({"lr_scheduler_type": "constant"}, "schedule.warmup_steps", 0),
        ({"warmup_steps": 0.25}, "schedule.warmup_fraction", 0.25),
        ({"warmup_steps": 12, "warmup_ratio": 0.5}, "schedule.warmup_steps", 12),
        ({"optim": "paged_adamw_8bit"}, "optimizer.kind", "adamw8bit"),
        ({"optim": "lion_8bit"}, "optimizer.kind", "lion"),
        ({"optim": "galore_adamw"}, "optimizer.kind", "adamw"),
        ({"fp16": True}, "train.precision.value", "fp16"),
        ({"max_steps": -1, "num_train_epochs": 4}, "train.max_epochs", 4),
        ({"fsdp": "shard_grad_op auto_wrap"}, "zero.stage", 2),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, "zero.stage", 1),
        ({"eval_strategy": "no", "eval_steps": 5}, "train.eval_every", None),
        ({"save_total_limit": 5}, "checkpoint.keep", 5),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
            "schedule.final_factor",
            0.2,
        ),
    ],
)
def test_a_value_of_the_trainer_becomes_ours(
    given: dict[str, Any], key: str, ours: Any, migrate: Any
) -> None:
    value: Any = migrate({"per_device_train_batch_size": 8} | given).config()
    for name in key.split("."):
        value = getattr(value, name)
    assert value == pytest.approx(ours) if isinstance(ours, float) else value == ours


def test_muon_is_not_clipped(migrate: Any) -> None:
    given = {"base_model": "mine/model", "optimizer": "muon", "max_grad_norm": 0.5}
    made = migrate(given)
    assert made.config().train.grad_clip == 0
    assert "max_grad_norm=0.5" in made.said


def test_a_key_that_nobody_knows_is_named(migrate: Any) -> None:
    made = migrate({"base_model": "mine/model", "flux_capacitor": {"volts": 3}})
    assert "flux_capacitor.volts=3" in made.said
    assert "is not known" in made.said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stage": "dpo"}, "stage=dpo has no counterpart"),
        ({"finetuning_type": "freeze"}, "finetuning_type=freeze has no counterpart"),
        ({"cutoff_len": "long"}, "cutoff_len=long cannot be read"),
        ({"stage": {"a": 1}}, "stage={'a': 1} cannot be read"),
        ({"lora_target": {"a": 1}}, "lora_target={'a': 1} cannot be read"),
        ({"lora_dropout": 2}, "adapter.dropout=2.0 is above 0.9"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_and_nothing_is_written(
    given: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "given.json"
    file.write_text(json.dumps({"model_name_or_path": "mine/model"} | given))
    out = tmp_path / "experiment" / "given.yaml"
    assert said in refusal([str(file), "--out", str(out)], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("apples: 3", "has no key of axolotl, LLaMA-Factory, HF Trainer, DeepSpeed"),
        ("- base_model", "holds no settings by name"),
        ("{", "is neither JSON nor YAML"),
        ("a: [", "is neither JSON nor YAML"),
        ("", "holds no settings by name"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_a_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    assert said in refusal([str(file)], capsys)


def test_an_experiment_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "experiment" / "mine.yaml"
    words = [str(FILES / "zero3_offload.json"), "--out", str(out)]
    assert main(words) == 0
    before = out.read_text()
    capsys.readouterr()
    assert "exists; give another name" in refusal(words, capsys)
    assert out.read_text() == before


def test_a_place_that_no_run_could_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(FILES / "zero3_offload.json"), "--out", str(tmp_path / "mine.yaml")]
    assert f"say --out {tmp_path / 'experiment' / 'mine'}.yaml" in refusal(words, capsys)


def test_the_command_that_is_named_runs_the_experiment(tmp_path: Path, cache: Path) -> None:
    shutil.copy(FILES / "zero2_whole.json", tmp_path / "two.json")
    out = tmp_path / "experiment" / "two.yaml"
    words = [sys.executable, "-m", "llmtrain.migrate", "two.json", "--out", str(out)]
    where: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    made = subprocess.run(words, capture_output=True, text=True, check=True, **where)
    line = next(line for line in made.stdout.splitlines() if "llmtrain.plan" in line)
    asked = line.split()[1:-2]  # without `python`, and the two words that are left to fill in
    asked += ["hardware=rtx4090x1", f"cache_root={cache}", "format=json"]
    planned = subprocess.run([sys.executable, *asked], capture_output=True, text=True, **where)
    assert json.loads(planned.stdout)["zero_stage"] == 2, planned.stderr
