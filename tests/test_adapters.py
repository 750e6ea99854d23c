"""Adapters on real ranks: peft's own curves, folders that peft opens, nothing adapted in vain."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from llmtrain.adapter.lora import LoRA
from llmtrain.checks import check_here
from llmtrain.config import load
from llmtrain.data.order import step_sequences
from llmtrain.data.sequences import PackedSequences
from llmtrain.data.shards import Manifest
from llmtrain.errors import ConfigError
from llmtrain.folder import RunFolder
from llmtrain.model.facts import measure, on_meta
from llmtrain.model.linear import adaptable
from llmtrain.plan import Plan, make_plan
from tests.conftest import Command
from tests.finished_models import TEMPLATE, Models
from tests.test_compose import compose_config
from tests.test_train import Bench

# peft asks transformers for its Conv1D by a name that it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
EVERY_EXPERT = {"num_experts_per_tok": 4}  # of 4: few tokens alone would leave one untaught
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {**SIZES, **HEADS, "intermediate_size": 128},
    "mixtral": {**SIZES, **HEADS, **EVERY_EXPERT, "num_local_experts": 4, "intermediate_size": 64},
    "mamba": {**SIZES, "state_size": 8},
    "mamba2": {**SIZES, "state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1},
    "jamba": {
        **SIZES,
        **HEADS,
        "intermediate_size": 64,
        **EVERY_EXPERT,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
}
LORA = ["adapter=lora", "adapter.rank=2", "adapter.alpha=8", "adapter.lr=1e-2"]
QLORA, DORA = (["adapter=" + kind, *LORA[1:]] for kind in ("qlora", "dora"))
NAMED = [*LORA, "adapter.target_modules=[q_proj,1.mlp.up_proj]"]
Runs = dict[str, tuple[str, str, list[str]]]  # by name: the task, the base, and overrides


def at_stage(words: list[str], stage: int, num_steps: int = 4) -> list[str]:
    """These words at a ZeRO stage, of which 3 partitions the small weights of a test, too."""
    if stage == 3:
        words = [*words, "+zero.extra.zero_optimization.stage3_param_persistence_threshold=0"]
    return [*words, f"zero.stage={stage}", f"train.max_steps={num_steps}"]


ALONE: Runs = {
    "lora0": ("final_logits", "qwen2", at_stage(LORA, 0, num_steps=20)),
    "lora1": ("final_logits", "qwen2", at_stage(LORA, 1)),
    "lora2": ("final_logits", "qwen2", at_stage(LORA, 2)),
    "lora3": ("final_logits", "qwen2", at_stage(LORA, 3)),
    "continued": ("save_and_continue", "qwen2", at_stage(LORA, 1)),
    "qlora": ("final_logits", "qwen2", at_stage(QLORA, 0, num_steps=20)),
    "qlora_mamba": ("final_logits", "mamba", at_stage(QLORA, 0)),
    "dora": ("final_logits", "qwen2", at_stage(DORA, 0)),
    "gpt2_lora": ("final_logits", "gpt2", at_stage(LORA, 0)),
    "gpt2_full": ("final_logits", "gpt2", at_stage(["adapter.lr=1e-3"], 0)),
    **{f"{name}_learns": ("first_gradients", name, at_stage(LORA, 0)) for name in FAMILIES},
    "dora_learns": ("first_gradients", "gpt2", at_stage(DORA, 0)),
    "named_learns": ("first_gradients", "qwen2", at_stage(NAMED, 0)),
}
TOGETHER: Runs = {
    "lora0": ("final_logits", "qwen2", at_stage(LORA, 0, num_steps=20)),
    "lora1": ("final_logits", "qwen2", at_stage(LORA, 1, num_steps=20)),
    "lora2": ("final_logits", "qwen2", at_stage(LORA, 2, num_steps=20)),
    "lora3": ("final_logits", "qwen2", at_stage(LORA, 3, num_steps=20)),
    "continued": ("save_and_continue", "qwen2", at_stage(LORA, 3, num_steps=20)),
    "qlora": ("final_logits", "qwen2", at_stage(QLORA, 3, num_steps=20)),
    "dora": ("final_logits", "qwen2", at_stage(DORA, 3)),
    "mixtral": ("final_logits", "mixtral", at_stage(LORA, 3)),
    "jamba": ("final_logits", "jamba", at_stage(LORA, 3)),
}


@dataclass(frozen=True)
class Outcome:
    """A run's folder and what its task said."""

    folder: Path
    said: Any

    @property
    def plan(self) -> Plan:
        return Plan.load(self.folder / "plan.json")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(
    models: Models, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    return outcomes(ALONE, 1, models, cache, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(
    models: Models, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    return outcomes(TOGETHER, 2, models, cache, tmp_path_factory.mktemp("together"))


def outcomes(
    runs: Runs, num_ranks: int, models: Models, cache: Path, folder: Path
) -> dict[str, Outcome]:
    """All of these runs, trained in processes that start once."""
    bench = Bench(Command(cache, folder, folder))
    for name, (task, base, words) in runs.items():
        bench.add(name, task, *sft(models, base), *words, f"hardware=cpux{num_ranks}")
    said = zip(bench.tasks, bench.run(num_ranks), strict=True)
    found = [Outcome(Path(task["folder"]), result) for task, result in said]
    return dict(zip(runs, found, strict=True))


def sft(models: Models, base: str) -> list[str]:
    """The words that fine-tune a base model on the dialogues in fp32."""
    data = ["data=chat", f"data.path={models.chat_rows}", "data.validation_fraction=0.2"]
    model = ["model=pretrained", f"model.path={base_folder(models, base)}"]
    return [
        "mode=sft",
        *data,
        *model,
        "train.seq_len=64",
        "train.global_batch=4",
        "train.precision=fp32",
    ]


def base_folder(models: Models, name: str) -> Path:
    """A model with random weights; all but GPT-2 know ChatML and end a text as a turn ends."""
    path = models.root / name
    if not path.exists():
        models.save(name, **FAMILIES[name])
        tokenizer = models.tokenizer(None if name == "gpt2" else TEMPLATE)
        if name != "gpt2":
            tokenizer.eos_token = "<|im_end|>"
        tokenizer.save_pretrained(path)
    return path


def nf4() -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **options)}


def plain_curve(run: Outcome, **loading: Any) -> list[float]:
    """The losses of peft in a plain loop over the same sequences."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config, plan = load(run.folder / "config.yaml"), run.plan
    manifest = Manifest.load(Path(json.loads(RunFolder(run.folder).manifest.read_text())["folder"]))
    sequences = PackedSequences(manifest, "train", plan.seq_len, packing=True)
    torch.manual_seed(config.seed)
    base = AutoModelForCausalLM.from_pretrained(config.model.path, **loading)
    lora = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(plan.num_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * config.schedule.factor(
            step, plan.num_steps, plan.warmup_steps
        )
        chosen = step_sequences(config.seed, step, plan.global_batch, len(sequences))
        batch = {name: torch.from_numpy(values) for name, values in sequences.batch(chosen).items()}
        labels_BL = batch.pop("labels")
        logits_BLV = model(**batch, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def opened_logits(model: Any) -> list[float]:
    """The logits of the tasks' fixed text."""
    with torch.no_grad():
        return model(torch.arange(2, 18)[None]).logits[0, -1].tolist()


def opened_by_peft(folder: Path, **loading: Any) -> list[float]:
    """The logits of an adapter on the base that it names."""
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(folder, **loading)
    # Else bitsandbytes multiplies in 16 bits on a CPU. Nothing is dropped out.
    return opened_logits(model.train(bool(loading)))


def largest_of_B(folder: Path) -> list[float]:
    """The largest value of each matrix B of a saved adapter."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "lora_B" in name]  # noqa: SIM118
        return [float(file.get_tensor(name).abs().max()) for name in names]


def test_the_curve_of_lora_is_that_of_peft_in_a_plain_loop(
    alone: dict[str, Outcome], together: dict[str, Outcome]
) -> None:
    plain = plain_curve(alone["lora0"])
    assert plain[-1] < plain[0] / 2
    for run in (alone["lora0"], *(together[f"lora{stage}"] for stage in range(4))):
        assert run.said["losses"] == pytest.approx(plain, rel=1e-3), run.folder


def test_the_curve_of_qlora_is_that_of_peft_in_a_plain_loop(
    alone: dict[str, Outcome], together: dict[str, Outcome]
) -> None:
    plain = plain_curve(alone["qlora"], **nf4())
    for runs in (alone, together):
        assert runs["qlora"].said["losses"] == pytest.approx(plain, rel=1e-2)
    apart = [abs(a - b) for a, b in zip(plain, alone["lora0"].said["losses"], strict=True)]
    assert max(apart) > 1e-2  # the weights are quantised


def test_peft_alone_opens_the_adapter_of_every_stage_with_the_trainers_logits(
    alone: dict[str, Outcome], together: dict[str, Outcome]
) -> None:
    names = ["lora0", "lora1", "lora2", "lora3", "dora"]
    runs = [runs[name] for runs in (alone, together) for name in names]
    for run in [*runs, together["mixtral"], together["jamba"]]:
        final = run.folder / "final"
        assert min(largest_of_B(final)) > 0, run.folder
        assert opened_by_peft(final) == pytest.approx(run.said["logits"], abs=1e-4), run.folder


def test_peft_alone_opens_the_adapter_of_quantised_weights(
    alone: dict[str, Outcome], together: dict[str, Outcome]
) -> None:
    for run in (alone["qlora"], together["qlora"]):
        final = run.folder / "final"
        assert min(largest_of_B(final)) > 0
        assert opened_by_peft(final, **nf4()) == pytest.approx(run.said["logits"], abs=1e-4)


def test_weights_that_a_mixer_reads_past_its_layers_are_not_quantised(
    alone: dict[str, Outcome],
) -> None:
    losses = alone["qlora_mamba"].said["losses"]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("name", [*FAMILIES, "dora"])
def test_everything_that_is_adapted_learns_and_is_counted(
    alone: dict[str, Outcome], name: str
) -> None:
    run = alone[f"{name}_learns"]
    assert [name for name, value in run.said["faintest"].items() if not value > 0] == []
    assert run.said["num_trained"] == run.plan.num_trainable_parameters


@pytest.mark.parametrize(
    "architecture", ["bamba", "deepseek_v3", "falcon_h1", "glm4_moe", "jetmoe", "phimoe", "zamba2"]
)
def test_peft_adapts_what_the_plan_counts(architecture: str) -> None:
    from transformers import AutoConfig

    mixers = {"layers_block_type": ["mamba", "hybrid"] * 2} if architecture == "zamba2" else {}
    config = AutoConfig.for_model(architecture, num_hidden_layers=4, **mixers)
    lora, model = LoRA(rank=2, alpha=4), on_meta(config)
    with torch.device("meta"):
        adapted = lora.put_on(model, adaptable(model))
    trained = [param.numel() for param in adapted.parameters() if param.requires_grad]
    assert sum(trained) == lora.num_trainable(measure(config))


def test_layers_are_adapted_by_name(alone: dict[str, Outcome]) -> None:
    run = alone["named_learns"]
    adapted = [name.split(".layers.")[1].split(".lora_B")[0] for name in run.said["faintest"]]
    assert sorted(adapted) == ["0.self_attn.q_proj", "1.mlp.up_proj", "1.self_attn.q_proj"]
    assert run.said["num_trained"] == run.plan.num_trainable_parameters


def test_a_lora_continues_to_the_bit_from_a_checkpoint_of_the_adapter_alone(
    alone: dict[str, Outcome], together: dict[str, Outcome], models: Models
) -> None:
    weights = (base_folder(models, "qwen2") / "model.safetensors").stat().st_size
    for runs, straight in ((alone, "lora1"), (together, "lora3")):
        assert runs["continued"].said == runs[straight].said["losses"]
        (checkpoint,) = (runs["continued"].folder / "checkpoints").iterdir()
        files = list(checkpoint.glob("rank_*.safetensors"))
        assert sum(file.stat().st_size for file in files) < weights / 5
        for file in files:
            with safe_open(file, "pt") as fragments:
                assert all(".lora_" in name for name in fragments.keys())  # noqa: SIM118


def test_gpt2_without_padding_and_template_is_tuned_whole_or_by_an_adapter(
    alone: dict[str, Outcome],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole, adapter = alone["gpt2_full"], alone["gpt2_lora"]
    opened = AutoModelForCausalLM.from_pretrained(whole.folder / "final")
    assert opened_logits(opened) == pytest.approx(whole.said["logits"], abs=1e-4)
    assert opened_by_peft(adapter.folder / "final") == pytest.approx(
        adapter.said["logits"], abs=1e-4
    )
    for run in (whole, adapter):
        assert run.said["losses"][-1] < run.said["losses"][0] - 1
        tokenizer = AutoTokenizer.from_pretrained(run.folder / "final")
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)


@pytest.mark.parametrize(
    ("base", "words", "said"),
    [
        ("qwen2", ["adapter.target_modules=[q_proj,w1]"], "w1 names no linear layer"),
        ("qwen2", ["adapter.target_modules=[]"], "names no layer; give auto or a list"),
        ("mamba", ["adapter.target_modules=out_proj"], "out_proj names no linear layer"),
        ("mixtral", ["adapter=dora"], "adapter=dora is not possible on the experts of a mixture"),
        ("mixtral", ["adapter.dropout=0.1"], "adapter.dropout=0.1 is not possible on the experts"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_one_line(
    models: Models, cache: Path, base: str, words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        make_plan(compose_config(*sft(models, base), *LORA, f"cache_root={cache}", *words))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_an_adapter_on_fresh_weights_can_be_planned_and_not_trained(cache: Path) -> None:
    config = compose_config(*LORA, "hardware=h100x1", f"cache_root={cache}")
    assert make_plan(config).adapter == "lora"
    with pytest.raises(ConfigError, match="adapter=lora adapts weights that exist"):
        check_here(config, "cpu", "none", "none")


def test_an_adapter_is_no_model_to_train_on(models: Models, alone: dict[str, Outcome]) -> None:
    final = alone["lora0"].folder / "final"
    with pytest.raises(ConfigError, match="is an adapter without its model; merge it first"):
        make_plan(compose_config(*sft(models, "qwen2"), *LORA, f"model.path={final}"))
