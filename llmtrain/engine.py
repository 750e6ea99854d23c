"""A plan as a model inside a DeepSpeed engine: the only place that starts DeepSpeed."""

from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmtrain.choose import MAMBA_EXTENSIONS
from llmtrain.config import RunConfig
from llmtrain.errors import TrainingError
from llmtrain.finite import discard_bad_steps
from llmtrain.gradient_norm import look_before_muon
from llmtrain.meeting import meet
from llmtrain.model.linear import adaptable
from llmtrain.model.stored import make_savable
from llmtrain.objective import checkpointable_layers, objective_of, recompute
from llmtrain.plan import Plan, reads_teacher
from llmtrain.ranks import Ranks
from llmtrain.teaching import build_teacher
from llmtrain.zero import deepspeed_config

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel

    from llmtrain.data.tokenizer import Vocabulary


def start_ranks(plan: Plan, ranks: Ranks, meeting_seconds: float) -> "torch.device":
    """Join the process group and take this rank's device and share of cores.

    DeepSpeed has been imported for the plan's device. Raises TrainingError naming those ranks that
    have not come after so many seconds.
    """
    import deepspeed
    import torch

    torch.set_num_threads(plan.threads_per_rank)
    if plan.device == "cpu":
        # A C++ operator for small messages between processes of one CPU: a long compilation at the
        # first start, for what gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if plan.device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
        torch.set_float32_matmul_precision("high")
    backend = "nccl" if plan.device == "cuda" else "gloo"
    meet(ranks, backend, meeting_seconds)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return torch.device("cuda", ranks.local_rank) if plan.device == "cuda" else torch.device("cpu")


def build_engine(
    config: RunConfig, plan: Plan, vocabulary: "Vocabulary", device: "torch.device"
) -> "DeepSpeedEngine":
    """The objective (model and mode), its optimizer and DeepSpeed around both.

    Every rank starts from the same weights, whatever the number of ranks and the ZeRO stage.
    """
    import deepspeed
    import torch

    torch.manual_seed(config.seed)
    with device if config.model.path is None else nullcontext():  # stored weights are moved later
        model: Any = build_model(config, plan, vocabulary)
    teacher = build_teacher(config, plan, device) if reads_teacher(config) else None
    objective = objective_of(model, config.mode, teacher)
    optimizer = config.optimizer.build(model, plan.device, plan.offload_optimizer != "none")
    largest = max(param.numel() for param in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        config=deepspeed_config(plan, config.zero.extra, largest),
        dist_init_required=False,
    )
    undo_trial_step(engine)
    discard_bad_steps(engine, plan.grad_clip)
    if config.optimizer.whole_gradients and plan.zero_stage:
        look_before_muon(engine)
    if plan.zero_stage == 3:
        watch_weights(model)
    return engine


def load_mamba_ssm() -> None:
    """Raise TrainingError where mamba-ssm was found when planning, and is built for another torch.

    transformers would say nothing and take a scan that is a hundred times slower.
    """
    for extension in MAMBA_EXTENSIONS:
        try:
            import_module(extension)
        except ImportError as error:
            remedy = "Build it again (make install-cuda), or take model.kernels=chunked to wait"
            raise TrainingError(f"mamba-ssm does not load: {error}. {remedy}.") from None


def watch_weights(model: "torch.nn.Module") -> None:
    """Tell stage 3 which weights are read without a call of their own modules.

    DeepSpeed finds them by itself unless it is fetching them already: then they are read empty.
    """
    import deepspeed

    for module in model.modules():
        for param in weights_read_by(module):
            deepspeed.zero.register_external_parameter(module, param)


def weights_read_by(module: Any) -> list[Any]:
    """What a state-space mixer, a DoRA and peft's adapter of experts multiply with directly."""
    if hasattr(module, "A_log"):
        return [param for layer in module.children() for param in layer.parameters(recurse=False)]
    if getattr(module, "lora_magnitude_vector", None):
        return [*module.get_base_layer().parameters(), *module.lora_A.parameters()]
    if hasattr(module, "parameter_name"):
        return [module.get_param(), *module.lora_A.parameters(), *module.lora_B.parameters()]
    return []


def undo_trial_step(engine: "DeepSpeedEngine") -> None:
    """Forget the step with zero gradients by which DeepSpeed allocates 16-bit state at stage 0.

    It counts as a first step for Adam's bias correction and decays the masters once, so the curve
    would differ from that of every other stage.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() or not hasattr(optimizer, "fp16_groups"):
        return
    optimizer.optimizer.state.clear()
    for params, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for param, master in zip(params, masters, strict=True):
            master.data.copy_(param.data)


def build_model(config: RunConfig, plan: Plan, vocabulary: "Vocabulary") -> "PreTrainedModel":
    """The model as the plan wants it: dtype, attention, scan kernel, recomputation, compilation."""
    import torch

    from llmtrain.kernel import grouped_query, mixers, products

    if plan.scan_kernel == "mamba-ssm":
        load_mamba_ssm()
    # No pad_token_id: an embedding freezes the row of its padding, and this row ends documents.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"), vocabulary.eos_id)
    dtype = getattr(torch, plan.dtype_name)
    loading = config.adapter.loading(dtype, config.model.facts(config.cache))
    model = config.model.build(dtype, plan.attention, loading, **tokens, pad_token_id=None)
    make_savable(model.generation_config)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = vocabulary.eos_id
    mixers.install(model.config.model_type, plan.scan_kernel or "transformers", config.cache)
    if plan.has_wide_products:
        products.install()
    if grouped_query.wants_repeats(plan.device, plan.dtype_name):
        grouped_query.repeating().start()
    recompute(model, plan.activation_checkpointing)
    model.name_or_path = config.model.address  # where an adapter says that its model lies
    model = config.adapter.put_on(model, adaptable(model))
    if config.train.compile:
        for layer in checkpointable_layers(model):
            layer.compile()
    return model
