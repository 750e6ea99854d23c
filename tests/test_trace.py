"""A model is traced without values, and what is counted so is what the real one holds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmtrain import tracer
from llmtrain.config import RunConfig
from llmtrain.kernel import heads, mixers
from llmtrain.kernel.quantised import Quantised
from llmtrain.layers import depth_of, repetition
from llmtrain.live import LiveTensors
from llmtrain.model.linear import adaptable
from llmtrain.objective import objective_of, recompute
from llmtrain.plan import make_plan
from llmtrain.trace import PHASES, Setting
from llmtrain.tracer import Tracer, num_bytes
from llmtrain.tracing import traced
from tests.kernel.test_heads import model_of
from tests.test_compose import compose_config

# peft asks transformers for its Conv1D by a name that it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

FEW_LAYERS = ["model.config.vocab_size=512", "model.config.num_hidden_layers=2"]
SIZES = ["train.seq_len=128", "train.global_batch=2"]
MODELS = {
    "llama": ["model=llama_tiny", *FEW_LAYERS],
    "moe": ["model=moe_tiny", *FEW_LAYERS],
    "mamba": ["model=mamba_tiny", *FEW_LAYERS],
    "mamba2": ["model=mamba2_tiny", *FEW_LAYERS],
    "hybrid": ["model=hybrid_tiny", *FEW_LAYERS, "model.config.attn_layer_indices=[1]"],
    "gpt2": ["model=gpt2", "model.path=null", "model.config.n_layer=2", "model.config.n_embd=192"],
    "lora": ["model=llama_tiny", *FEW_LAYERS, "adapter=lora"],
}
SCANS = {"mamba": "chunked", "mamba2": "transformers", "hybrid": "transformers"}


def config_of(name: str, cache: Path, *words: str) -> RunConfig:
    return compose_config(*MODELS[name], *SIZES, f"cache_root={cache}", *words)


def setting(
    name: str, dtype: str = "float32", recompute: str = "none", is_wide: bool = False
) -> Setting:
    scan = SCANS.get(name)
    return Setting(dtype, "eager", scan, recompute, "cpu", 1, False, has_wide_products=is_wide)


@contextmanager
def one_thread() -> Iterator[None]:
    """A scan's blocks depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured_peak(config: RunConfig, asked: Setting, batch: int) -> int:
    """The most that lives beside weights in a real forward and backward, in bytes."""
    model: Any = config.model.build(getattr(torch, asked.dtype), asked.attention)
    mixers.install(model.config.model_type, asked.scan_kernel or "transformers")
    recompute(model, asked.recompute)
    model = config.adapter.put_on(model, adaptable(model)).train()
    objective = objective_of(model, config.mode)
    assert objective.learner.parts or config.model.name == "moe_tiny"
    gc.collect()
    account = LiveTensors(asked.has_wide_products)
    account.ignore([*model.parameters(), *model.buffers()])
    with one_thread(), account:
        tokens_BL = torch.randint(0, 500, (batch, config.train.seq_len))
        loss = objective({"input_ids": tokens_BL, "labels": tokens_BL.clone()})
        (loss.loss_sum + loss.penalty * loss.num_tokens).backward()
    return account.peak_bytes


def traced_peak(config: RunConfig, asked: Setting, batch: int) -> float:
    made = Tracer(config, asked)
    sample = made.sample(made.depth.num_layers, batch)
    return max(most for _, most in sample.peaks.values())


@pytest.mark.parametrize(("dtype", "recomputed"), [("float32", "none"), ("bfloat16", "full")])
@pytest.mark.parametrize("name", MODELS)
def test_a_trace_counts_the_bytes_that_the_real_model_holds(
    name: str, dtype: str, recomputed: str, cache: Path
) -> None:
    config, asked = config_of(name, cache), setting(name, dtype, recomputed)
    assert traced_peak(config, asked, batch=2) == measured_peak(config, asked, batch=2)


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_products_made_in_fp32_take_what_their_casts_take(name: str, cache: Path) -> None:
    config = config_of(name, cache)
    wide, narrow = (setting(name, "bfloat16", "none", is_wide) for is_wide in (True, False))
    assert traced_peak(config, wide, 2) == measured_peak(config, wide, 2)
    assert traced_peak(config, wide, 2) >= traced_peak(config, narrow, 2)
    dtypes = {row.dtype for row in Tracer(config, wide).sample(2, 2).ops if row.kind == "product"}
    assert "fp32" in dtypes


FUSED = {
    "mamba": ["model=mamba_tiny", *FEW_LAYERS],
    "falcon": ["model=falcon_mamba_7b", *FEW_LAYERS, "model.config.hidden_size=192"],
}


@pytest.mark.parametrize("name", FUSED)
def test_a_mamba_for_gpus_is_traced_with_kernels_that_keep_little(name: str, cache: Path) -> None:
    words = [*FUSED[name], *SIZES, f"cache_root={cache}"]
    kept, moved = {}, {}
    for scan in ("mamba-ssm", "chunked"):
        asked = Setting(
            "bfloat16", "eager", scan, "none", "cuda", 1, False, has_wide_products=False
        )
        sample = Tracer(compose_config(*words), asked).sample(2, 2)
        kept[scan] = sample.kept
        moved[scan] = sum(row.num_bytes * row.times for row in sample.ops)
    assert kept["mamba-ssm"] < kept["chunked"]
    assert moved["mamba-ssm"] < 0.5 * moved["chunked"]


def test_a_fused_mamba_layer_keeps_what_its_authors_kernel_saves(cache: Path) -> None:
    """Per token: its input of width h and its norm's, xz of 4 h, the scan's output of 2 h."""
    config = compose_config(*FUSED["mamba"], *SIZES, f"cache_root={cache}")
    asked = Setting(
        "bfloat16", "eager", "mamba-ssm", "none", "cuda", 1, False, has_wide_products=False
    )
    made = Tracer(config, asked)
    one, two = (made.sample(layers, 2).kept for layers in (1, 2))
    width = made.model.config.hidden_size
    assert 16 * width < (two - one) / (2 * config.train.seq_len) < 24 * width


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_few_layers_and_small_micro_batches_tell_what_the_whole_takes(
    recomputed: str, cache: Path
) -> None:
    words = ["model.config.num_hidden_layers=8", "train.seq_len=512", "train.global_batch=4"]
    config, asked = config_of("llama", cache, *words), setting("llama", recompute=recomputed)
    told = traced(config, asked)
    assert {(sample.num_layers, sample.batch) for sample in told.samples} == {
        (layers, batch) for layers in (2, 3) for batch in (1, 2)
    }
    whole = Tracer(config, asked).sample(8, 4)
    for with_gradients in (False, True):
        most = max(whole.peaks[phase][with_gradients] for phase in whole.peaks)
        assert told.peak(4, PHASES, with_gradients) == pytest.approx(most, rel=1e-3)
    assert told.kept(4) == pytest.approx(whole.kept, rel=1e-3)


@pytest.mark.parametrize("batch", [4, 8, 32])
@pytest.mark.parametrize(("mode", "learned_share"), [("pretrain", 1.0), ("sft", 0.5)])
def test_a_gpus_large_micro_batches_have_an_eighth_of_the_logits(
    batch: int, mode: str, learned_share: float, cache: Path
) -> None:
    """512 rows of them up to 4,096 tokens, and more beyond: a line would miss the bend."""
    words = ["model.config.vocab_size=32000", "train.seq_len=512", "train.global_batch=32"]
    config = config_of("llama", cache, *words, f"mode={mode}")
    asked = setting("llama", "bfloat16")._replace(device="cuda", learned_share=learned_share)
    whole, told = Tracer(config, asked).sample(2, batch), traced(config, asked)
    most = max(whole.peaks[phase][0] for phase in PHASES)
    assert told.peak(batch, PHASES, with_gradients=False) == pytest.approx(most, rel=1e-3)


def test_fp16_has_all_logits_at_once_and_is_traced_so(cache: Path) -> None:
    """Their gradient is scaled before the head's is summed up: or it could pass 65504."""
    words = ["model.config.vocab_size=32000", "train.seq_len=512", "train.global_batch=32"]
    config = config_of("llama", cache, *words)
    most = {
        dtype: traced(config, setting("llama", dtype)._replace(device="cuda")).peak(
            16, PHASES, False
        )
        for dtype in ("float16", "bfloat16")
    }
    logits = 2 * 16 * 512 * 32000
    assert most["float16"] - most["bfloat16"] > 1.5 * logits


def test_cards_without_flash_repeat_heads_instead_of_making_all_scores(cache: Path) -> None:
    """Of keys and values with half the heads copies are kept, and no matrix of L x L."""
    words = ["model.config.num_attention_heads=4", "model.config.num_key_value_heads=2"]
    config = config_of("llama", cache, *words, "train.seq_len=512")
    kept = {}
    for device in ("cpu", "cuda"):
        asked = setting("llama", "float16")._replace(device=device, attention="sdpa")
        kept[device] = Tracer(config, asked).sample(2, 1).kept
    copies = 2 * 2 * 4 * 128 * 512 * 2  # layers, keys and values, heads, their width, tokens, bytes
    assert 0 < kept["cuda"] - kept["cpu"] <= copies


def test_layers_repeat_after_some_that_do_not() -> None:
    assert repetition(["moe"] * 8) == (0, 1)
    assert repetition(["dense", *["moe"] * 8]) == (1, 1)
    assert repetition(["mamba", "mamba", "attention"] * 4) == (0, 3)
    assert repetition(["dense", *["local", "global"] * 4]) == (1, 2)


def test_traced_numbers_of_layers_lie_whole_periods_before_the_last() -> None:
    widths = [1, *[2, 3, 3] * 7, 2]
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(width, width) for width in widths)
    depth = depth_of(model, "none")
    few, more = depth.traced
    assert (depth.num_layers, more - few) == (len(widths), 3)
    assert few >= 4
    assert (len(widths) - more) % 3 == 0
    assert depth_of(nn.Linear(2, 2), "none").num_layers == 0


HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "mamba": {},
    "mixtral": {},
    "cohere": {"logit_scale": 0.5},
    "gemma2": {"head_dim": 16},
    "granite": {"logits_scaling": 8.0},
}


@pytest.mark.parametrize("architecture", HEADS)
def test_a_head_is_plain_without_values_where_it_is_with_them(architecture: str) -> None:
    config = HEADS[architecture]
    real = heads.plain_head(model_of(architecture, **config))
    with FakeTensorMode():
        found = tracer.plain_head(model_of(architecture, **config))
    assert (found is None) == (real is None) == bool(config)


def test_a_quantised_stand_in_has_the_bytes_of_the_real_one() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = nn.Linear(512, 384, bias=False, dtype=torch.bfloat16)
    options = {"bias": False, "quant_type": "nf4", "quant_storage": torch.bfloat16}
    real = bitsandbytes.nn.Linear4bit(512, 384, **options)
    real.load_state_dict(layer.state_dict())
    real.to("cpu")
    state = real.weight.quant_state
    tensors = [real.weight, state.absmax, state.state2.absmax]
    stand_in = Quantised(layer)
    has = [*stand_in.parameters(), *stand_in.buffers()]
    assert sum(map(num_bytes, has)) == sum(map(num_bytes, tensors))


class StrangerConfig(LlamaConfig):  # type: ignore[misc]
    """A model type that transformers does not have."""

    model_type = "stranger"


class Stranger(LlamaForCausalLM):  # type: ignore[misc]
    """A model that looks at its tokens outside torch, as no tensor without values can be."""

    config_class = StrangerConfig

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        assert input_ids.is_meta or (input_ids.numpy() >= 0).all()
        return super().forward(input_ids, **inputs)


def test_a_model_that_cannot_be_traced_is_planned_roughly_and_told(
    cache: Path, tmp_path: Path
) -> None:
    AutoConfig.register("stranger", StrangerConfig)
    AutoModelForCausalLM.register(StrangerConfig, Stranger)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
    StrangerConfig(**sizes, architectures=["Stranger"]).save_pretrained(tmp_path)
    words = ["model=pretrained", f"model.path={tmp_path}", "hardware=h100x1", f"cache_root={cache}"]
    plan = make_plan(compose_config(*words))
    assert plan.fits
    assert plan.step_seconds is None
    assert any("could not be traced, so memory is a rough" in line for line in plan.warnings)
