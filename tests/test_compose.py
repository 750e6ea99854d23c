"""What a command line may say, and what it is told when it is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain import compose
from llmtrain.config import RunConfig, load
from llmtrain.folder import write_text
from llmtrain.plan import make_plan
from tests.conftest import ROOT, Command

WRONG = {
    "modle=llama_tiny": "modle=llama_tiny is no key of the config; the nearest is mode",
    "model=lama_tiny": "model=lama_tiny is no choice of model; the nearest is llama_tiny",
    "experiment=quickstrat": "is no choice of experiment; the nearest is quickstart",
    "hardware=a80x1": "hardware=a80x1 is no choice of hardware; the nearest is a800x1",
    "train.max_step=3": "train.max_step=3 is no key of the config; the nearest is train.max_steps",
    "optimizer.beta3=1": "optimizer.beta3=1 is no key of the config; the nearest is optimizer",
    "+train.foo=1": "train.foo=1 is no key of the config",
    "++foo=1": "foo=1 is no key of the config",
    "train.max_steps=many": "train.max_steps=many is not a whole number",
    "train.max_steps=[1": "train.max_steps=[1 cannot be read",
    "train.max_steps=0": "train.max_steps=0 is below 1",
    "train=3": "train=3 is given for several keys",
    "train.precision=fp8": "train.precision=fp8 is not a choice; choose one of bf16, bf16_pure",
    "train.precision=fp16": "train.precision=fp16 has no kernels for training on a CPU",
    "train.max_steps=1 train.max_epochs=1": "train.max_steps=1 and train.max_epochs are both given",
    "train.global_batch=6 train.micro_batch=4": (
        "train.global_batch=6 is not a multiple of 1 ranks x micro_batch 4 = 4; nearest are 4 and 8"
    ),
    "train.activation_checkpointing=some": "train.activation_checkpointing=some is not understood",
    "train.seq_len=4096": "train.seq_len=4096 is longer than the model's 1024 positions",
    "model.config.hiden_size=64": "model.config.hiden_size=64 is no keyword of llama; the nearest",
    "model.config.hidden_size=300": (
        "model.config.hidden_size=300 is no multiple of head_dim=128; take 256 or 384"
    ),
    "model.config.vocab_size=lots": "vocab_size=lots is not a whole number",
    "model.config.num_hidden_layers=lots": "num_hidden_layers=lots is no positive",
    "model=mamba_tiny model.config.attention_dropout=0.1": "attention_dropout=0.1 is no keyword of",
    "optimizer.lr=-1": "optimizer.lr=-1.0 is not above 0",
    "optimizer=adamw8bit": "optimizer=adamw8bit has no kernel for cpu",
    "optimizer=adafactor zero.stage=2": "zero.stage=2 does not work with optimizer=adafactor",
    "optimizer=muon zero.offload_optimizer=cpu": "is not possible with optimizer=muon",
    "train.grad_clip=1": "train.grad_clip=1.0 clips what Muon has already scaled; set it to 0",
    "zero.stage=4": "zero.stage=4 is above 3",
    "data=text": "data.path=null is not set",
    "data=text data.path=/nowhere/at/all": "data.path=/nowhere/at/all",
    "model=pretrained": "model.path=null is needed",
    "model=pretrained model.path=/nowhere": "model.path=/nowhere does not exist",
    "seed=0,1": "seed=0,1 is several values; add -m",
    "mode=sft data=stdlib": "has text and mode=sft learns rows with answers",
    "adapter=lora": "adapts weights that exist",
    "mode=sft": "is needed: data=stdlib_qa brings no text to train a tokenizer on",
    "mode=distill mode.method=logits": "is needed for mode.method=logits",
    "model@teacher=pretrained teacher.path=x": "has no effect with mode=pretrain",
    "mode=distill mode.method=logits model@teacher=llama_tiny": "has fresh weights, which teach",
    "name=a/b": "name=a/b cannot name a folder",
    "hardware=a800x8 model=llama_tiny": "hardware.gpus_per_node=8 is more than the 0 GPUs",
    "zero.extra.zero_optimization.stage=1": "zero.extra.zero_optimization.stage=1 stands against",
    "+zero.extra.zero_optimization.offload_optimizer.device=cpu": "is not what was planned",
    "train.precision=bf16_pure zero.stage=2": "zero.stage=2 keeps fp32 masters",
    "model=null": "model=null is no choice",
    "model.config.head_dim=0": "model.config.head_dim=0 is no positive whole number",
    "model.config.num_hidden_layers=0": "model.config.num_hidden_layers=0 is no positive",
    "model.config.hidden_act=nosuch": "model.config=llama_tiny cannot be made",
    "model=moe_tiny model.config.num_experts_per_tok=9": "is more than the 8 experts",
    "optimizer.kind=adamw": "optimizer.kind=adamw is chosen with its group; write optimizer=adamw",
    "schedule.warmup_steps=100000": "schedule.warmup_steps=100000 is more than the run's",
    "schedule.warmup_steps=1 schedule.warmup_fraction=0.1": (
        "schedule.warmup_steps=1 and schedule.warmup_fraction are both given; give one of them"
    ),
    "zero.extra.fp16.enabled=true": "zero.extra.fp16={'enabled': True} is decided by",
    "cache_root=/etc/passwd": "cache_root=/etc/passwd cannot be made",
    "output_root=/etc/passwd": "output_root=/etc/passwd",
    "zero.offload_optimizer=nvme optimizer=adamw": "zero.nvme_path=null is needed",
    "callback=early_stoping": "callback=early_stoping is no choice of callback; the nearest",
    "callback=[early_stopping,mine]": "callback=mine is no choice of callback",
    "callback=early_stopping callback.early_stopping.patience=0": "patience=0 is below 1",
    "tracker=wandb tracker.mode=of": "tracker.mode=of is not a choice; choose one of online",
    "resume=last": "resume=last is not one of the ways to start; "
    "give auto, never, a step of this run, a run folder or a checkpoint",
}


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command in this process and return its exit code."""
    from llmtrain.run import run

    monkeypatch.setattr(sys, "argv", ["run", *words])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return compose.main(run, "run", "")


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_no_folder(
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    cache: Path,
) -> None:
    outputs = tmp_path / "outputs"
    words = [f"cache_root={cache}", f"output_root={outputs}", "hardware=cpux1", *line.split()]
    if "hardware=a8" in line:
        words.remove("hardware=cpux1")
    assert call(words, monkeypatch) == 2
    said = capfd.readouterr()
    assert said.err.count("\n") == 1, said.err
    assert WRONG[line] in said.err
    assert "Traceback" not in said.err + said.out
    assert not outputs.exists()


def test_ranks_started_by_someone_else_are_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert call(["seed=1"], monkeypatch) == 2
    assert "run: python -m llmtrain.run seed=1" in capfd.readouterr().err


def test_help_lists_every_group_and_choice(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(["--help"], monkeypatch) == 0
    said = capfd.readouterr().out
    for group in {path.parent for path in (ROOT / "conf").glob("*/*.yaml")}:
        assert f"{group.name}: " in said
        assert all(choice.stem in said for choice in group.glob("*.yaml"))


@pytest.mark.parametrize(
    "words", [["--help"], ["model=lama"], ["train.max_steps=x"], ["--cfg=job"]]
)
def test_help_composing_and_refusing_import_no_torch(words: list[str]) -> None:
    script = (
        "import sys; from llmtrain import compose; from llmtrain.run import run; "
        f"sys.argv = ['run', *{words!r}]; compose.main(run, 'run', ''); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules); "
        "sys.exit(len(heavy))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 0


def compose_config(*overrides: str) -> RunConfig:
    """The typed config of some overrides."""
    return compose.composed(list(overrides))


@pytest.mark.parametrize(
    "name", [name for name in compose.choices("model") if name != "pretrained"]
)
def test_every_model_composes_and_plans(name: str, cache: Path) -> None:
    hardware = "cpux1" if name.endswith("_tiny") else "h100x8"
    plan = make_plan(compose_config(f"model={name}", f"hardware={hardware}", f"cache_root={cache}"))
    assert plan.fits
    assert plan.model == name
    if plan.weights_fingerprint is None:  # it starts afresh
        assert plan.num_steps * plan.tokens_per_step >= plan.num_parameters / 20


@pytest.mark.parametrize("name", compose.choices("hardware"))
def test_every_hardware_composes_and_plans(name: str, cache: Path) -> None:
    words = [f"hardware={name}", f"cache_root={cache}", "model=llama_50m", "train.global_batch=96"]
    plan = make_plan(compose_config(*words))
    assert plan.world_size * plan.micro_batch * plan.grad_accum == plan.global_batch


@pytest.mark.parametrize("name", compose.choices("experiment"))
def test_every_experiment_composes_and_plans(name: str, cache: Path, corpus: Path) -> None:
    words = [f"experiment={name}", f"cache_root={cache}", f"data.path={corpus}"]
    if compose_config(*words[:1]).data.kind == "stdlib":
        words.pop()
    assert make_plan(compose_config(*words)).fits


@pytest.mark.parametrize(
    "group", ["optimizer", "schedule", "data", "mode", "adapter", "launcher", "tracker"]
)
def test_every_choice_of_the_small_groups_composes(group: str) -> None:
    for choice in compose.choices(group):
        part = getattr(compose_config(f"{group}={choice}"), group)
        assert choice in (part.kind, getattr(part, "name", None))


def test_a_config_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    config = compose_config("model=moe_tiny", "hardware=cpux2", "schedule=wsd", "++zero.extra.a=1")
    write_text(tmp_path / "config.yaml", config.to_yaml())
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "optimizer=adamw",
        "optimizer.lr=0.5",
        "data=text",
        "schedule=wsd",
        "train.seq_len=64",
        "train.max_steps=7",
        "model=mamba_tiny",
        "train.precision=fp32",
        "train.global_batch=32",
        "callback=early_stopping",
    ],
)
def test_what_is_learned_makes_another_run(override: str) -> None:
    assert compose_config(override).identity != compose_config().identity


@pytest.mark.parametrize(
    "override",
    [
        "hardware=a800x8",
        "zero.stage=3",
        "train.micro_batch=2",
        "output_root=/x",
        "cache_root=/x",
        "train.log_every=3",
        "checkpoint.every=9",
        "train.activation_checkpointing=full",
        "model.attention=sdpa",
        "train.compile=true",
        "debug=true",
        "tracker=mlflow",
        "callback=none",
        "data.path=/x",
        "name=other",
    ],
)
def test_where_and_how_fast_a_run_trains_leaves_it_the_same_run(override: str) -> None:
    assert compose_config(override).identity == compose_config().identity


def test_an_experiment_of_ones_own_folder_is_found_wherever_it_is_composed_again(
    command: Command,
) -> None:
    own = command.folder / "mine" / "experiment" / "short.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ntrain:\n  max_steps: 7\n")
    words = ["--config-dir", str(own.parent.parent), "experiment=short", "format=json"]
    single = command.run(*words, module="plan")  # which composes its proposals anew
    assert json.loads(single.stdout)["num_steps"] == 7, single.stderr
    grid = command.run("-m", *words, "seed=0,1", module="plan")
    assert [point["num_steps"] for point in json.loads(grid.stdout)] == [7, 7], grid.stderr


def test_a_folder_of_experiments_that_is_not_there_is_refused(command: Command) -> None:
    refused = command.run("--config-dir", "nowhere", "experiment=short", module="plan")
    assert refused.returncode == 2
    assert refused.stderr.startswith("--config-dir=nowhere is no folder; give one that has")
