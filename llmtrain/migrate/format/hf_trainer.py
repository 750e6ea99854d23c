"""The TrainingArguments of transformers' Trainer, as `to_json_string()` writes them."""

from typing import Any

from llmtrain.migrate.correspondence import (
    Format,
    Lost,
    Needless,
    Table,
    Term,
    To,
    Within,
    same,
    several,
)
from llmtrain.migrate.format.deepspeed import DEEPSPEED

DATA = "rows are tokenised once and kept; batches are put together while a step runs"
EVALUATION = (
    "held-out rows are evaluated in train.micro_batch sequences, and give loss and perplexity"
)
FOLDER = (
    "a run has its folder below output_root; the same command continues it, from any checkpoint"
)
HUB = "nothing is uploaded; on_finish.command can"
KERNELS = "model.kernels and model.attention choose the fastest that the device has"
LAUNCH = "llmtrain starts its own ranks, and finds those that hang"
LOGS = "metrics.jsonl and tensorboard/ have every train.log_every-th step"
RECOMPUTED = "train.activation_checkpointing, or the plan, decides"
OTHER_LOSS = "the loss is the cross-entropy of the tokens, averaged over a step"


def if_true(value: Any) -> bool | None:
    """A switch that is worth saying only where it is on."""
    return True if value else None


def whole(value: Any) -> int | None:
    """A number of steps; a share of them, or none, is no number of steps."""
    number = float(value)
    return int(number) if number >= 1 else None


def recomputation(value: Any) -> str | None:
    """All layers, or what the plan decides."""
    return "full" if value else None


def folder_name(value: Any) -> str | None:
    """A run's name; of a path its end."""
    name = str(value).rstrip("/").rpartition("/")[2]
    return None if name.startswith(".") else name


NEEDLESS = {
    DATA: (
        "accelerator_config dataloader_drop_last dataloader_in_order dataloader_num_workers"
        " dataloader_multiprocessing_context dataloader_persistent_workers dataloader_pin_memory"
        " dataloader_prefetch_factor data_seed dispatch_batches group_by_length ignore_data_skip"
        " include_num_input_tokens_seen include_tokens_per_second label_names length_column_name"
        " remove_unused_columns split_batches train_sampling_strategy"
    ),
    EVALUATION: (
        "batch_eval_metrics bf16_full_eval eval_accumulation_steps eval_delay"
        " eval_do_concat_batches eval_on_start eval_use_gather_object fp16_full_eval"
        " include_for_metrics include_inputs_for_metrics per_device_eval_batch_size"
        " per_gpu_eval_batch_size prediction_loss_only greater_is_better metric_for_best_model"
    ),
    FOLDER: (
        "enable_jit_checkpoint load_best_model_at_end output_dir overwrite_output_dir"
        " restore_callback_states_from_checkpoint resume_from_checkpoint save_on_each_node"
        " save_only_model save_safetensors do_train do_eval do_predict"
    ),
    HUB: (
        "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token"
        " push_to_hub push_to_hub_model_id push_to_hub_organization push_to_hub_token"
    ),
    KERNELS: (
        "bf16_backend fp16_backend fp16_opt_level half_precision_backend jit_mode_eval"
        " liger_kernel_config tf32 torch_compile_backend torch_compile_mode torchdynamo"
        " use_cache use_liger_kernel use_ipex"
    ),
    LAUNCH: (
        "auto_find_batch_size ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb"
        " ddp_find_unused_parameters ddp_static_graph ddp_timeout debug full_determinism local_rank"
        " log_on_each_node mp_parameters no_cuda parallelism_config ray_scope skip_memory_metrics"
        " torch_empty_cache_steps tpu_metrics_debug tpu_num_cores use_cpu use_mps_device"
        " use_legacy_prediction_loop past_index fsdp_min_num_params"
        " fsdp_transformer_layer_cls_to_wrap"
    ),
    RECOMPUTED: "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
    LOGS: (
        "disable_tqdm log_level log_level_replica logging_dir logging_first_step"
        " logging_nan_inf_filter logging_strategy project report_to trackio_bucket_id"
        " trackio_space_id trackio_static_space_id"
    ),
}

LOST = {
    "label_smoothing_factor": OTHER_LOSS,
    "neftune_noise_alpha": "no noise is put on embeddings",
    "optim_args": "optimizer.* has what there is",
    "optim_target_modules": "optimizer=muon keeps less state; adapter=lora less still",
    "average_tokens_across_devices": OTHER_LOSS,
}

TABLE: Table = {
    "per_device_train_batch_size": Term("batch.per_device", int),
    "per_gpu_train_batch_size": Term("batch.per_device", int),
    "gradient_accumulation_steps": Term("batch.accumulation", int),
    "max_length": To("train.seq_len", int),  # of TRL's SFTConfig, as the next
    "max_seq_length": To("train.seq_len", int),
    "num_train_epochs": Term("horizon.epochs", float),
    "max_steps": Term("horizon.steps", int),
    "learning_rate": Term("rate", float),
    "optim": Term("optimizer.kind"),
    "adafactor": Term("optimizer.is_adafactor"),
    "weight_decay": To("optimizer.weight_decay", float),
    "adam_beta1": To("optimizer.beta1", float),
    "adam_beta2": To("optimizer.beta2", float),
    "adam_epsilon": To("optimizer.eps", float),
    "max_grad_norm": Term("optimizer.grad_clip", float),
    "lr_scheduler_type": Term("schedule.kind"),
    "lr_scheduler_kwargs": Term("schedule.options", same),
    "warmup_ratio": Term("warmup.ratio", float),
    "warmup_steps": Term("warmup.steps", float),
    "bf16": Term("precision.bf16"),
    "fp16": Term("precision.fp16"),
    "gradient_checkpointing": To("train.activation_checkpointing", recomputation),
    "activation_checkpointing": To("train.activation_checkpointing", recomputation),
    "torch_compile": To("train.compile", if_true),
    "seed": To("seed", int),
    "run_name": To("name", folder_name),
    "logging_steps": To("train.log_every", whole),
    "eval_strategy": Term("evaluation.strategy"),
    "evaluation_strategy": Term("evaluation.strategy"),
    "eval_steps": Term("evaluation.steps", float),
    "save_strategy": Term("saving.strategy"),
    "save_steps": Term("saving.steps", float),
    "save_total_limit": To("checkpoint.keep", whole),
    "deepspeed": Within(DEEPSPEED),
    "fsdp": Term("fsdp.how", several),
    "fsdp_config": Term("fsdp.config", same),
    **{key: Needless(why) for why, keys in NEEDLESS.items() for key in keys.split()},
    **{key: Lost(why) for key, why in LOST.items()},
}

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "bf16": False,
    "fp16": False,
    "seed": 42,
}

UNSAID: dict[str, Any] = {
    "accelerator_config": {
        "split_batches": False,
        "dispatch_batches": None,
        "even_batches": True,
        "use_seedable_sampler": True,
        "non_blocking": False,
        "gradient_accumulation_kwargs": None,
        "use_configured_state": False,
    },
    "average_tokens_across_devices": True,
    "dataloader_in_order": True,
    "dataloader_pin_memory": True,
    "ddp_timeout": 1800,
    "eval_do_concat_batches": True,
    "fp16_backend": "auto",
    "fp16_opt_level": "O1",
    "fsdp_config": {
        "min_num_params": 0,
        "xla": False,
        "xla_fsdp_v2": False,
        "xla_fsdp_grad_ckpt": False,
    },
    "half_precision_backend": "auto",
    "hub_strategy": "every_save",
    "hub_token": "<HUB_TOKEN>",
    "include_num_input_tokens_seen": "no",
    "length_column_name": "length",
    "local_rank": -1,
    "log_level": "passive",
    "log_level_replica": "warning",
    "log_on_each_node": True,
    "logging_nan_inf_filter": True,
    "logging_steps": 500,
    "logging_strategy": "steps",
    "per_device_eval_batch_size": 8,
    "project": "huggingface",
    "push_to_hub_token": "<PUSH_TO_HUB_TOKEN>",
    "ray_scope": "last",
    "remove_unused_columns": True,
    "report_to": "none",
    "save_safetensors": True,
    "save_steps": 500,
    "skip_memory_metrics": True,
    "trackio_space_id": "trackio",
    "train_sampling_strategy": "random",
}

HF_TRAINER = Format(
    "HF Trainer",
    frozenset({"per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type"}),
    TABLE,
    DEFAULTS,
    UNSAID,
    ("model=<model>", "data=<data>"),
)
