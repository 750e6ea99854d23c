"""DeepSpeed's JSON: how state is spread, precision, and perhaps optimizer and schedule."""

from typing import Any

from llmtrain.migrate.correspondence import Format, Lost, Needless, Table, Term, To

SIZES = (
    "allgather_bucket_size",
    "reduce_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
COMMUNICATION = (
    "allgather_partitions",
    "contiguous_gradients",
    "load_from_fp32_weights",
    "overlap_comm",
    "reduce_scatter",
    "round_robin_gradients",
)
SAVING = (
    "gather_16bit_weights_on_model_save",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)
COMPRESSION = (
    "mics_shard_size",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)
LOGS = (
    "comms_config",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "monitor_config",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
)
ZERO = "zero_optimization."

PLANNED = "the plan decides; to insist: zero.extra.zero_optimization.<key>"
LOSS_SCALE = "the loss scale of fp16 is found by itself"


def cpu_if(value: Any) -> str | None:
    """Offload as DeepSpeed's first versions wrote it."""
    return "cpu" if value else None


def numbers(values: Any) -> list[float]:
    return [float(value) for value in values]


TABLE: Table = {
    "train_batch_size": Term("batch.total", int),
    "train_micro_batch_size_per_gpu": Term("batch.per_device", int),
    "gradient_accumulation_steps": Term("batch.accumulation", int),
    "gradient_clipping": Term("optimizer.grad_clip", float),
    "bf16.enabled": Term("precision.bf16"),
    "bfloat16.enabled": Term("precision.bf16"),
    "fp16.enabled": Term("precision.fp16"),
    "fp16.*": Needless(LOSS_SCALE),
    "bf16.*": Needless("bf16 keeps fp32 masters, and accumulates in fp32 where that matters"),
    "data_types.*": Needless("bf16 keeps fp32 masters, and accumulates in fp32 where that matters"),
    "amp.*": Lost("take train.precision=bf16"),
    "optimizer.type": Term("optimizer.kind"),
    "optimizer.params.lr": Term("rate", float),
    "optimizer.params.betas": Term("optimizer.betas", numbers),
    "optimizer.params.eps": To("optimizer.eps", float),
    "optimizer.params.weight_decay": To("optimizer.weight_decay", float),
    "optimizer.params.momentum": To("optimizer.momentum", float),
    "optimizer.params.torch_adam": Needless("the fastest that the device has is taken"),
    "optimizer.params.adam_w_mode": Needless("weight decay is always apart from the gradient"),
    "optimizer.params.*": Lost("optimizer.* has what there is"),
    "scheduler.type": Term("schedule.kind"),
    "scheduler.params.warmup_num_steps": Term("warmup.steps", float),
    "scheduler.params.warmup_max_lr": Term("schedule.peak_lr", float),
    "scheduler.params.warmup_min_lr": Lost("a warm-up begins at 1 / warmup_steps of the rate"),
    "scheduler.params.warmup_type": Term("warmup.type"),
    "scheduler.params.cos_min_ratio": Term("schedule.final_factor", float),
    "scheduler.params.total_num_steps": Term("horizon.steps", int),
    "scheduler.params.*": Lost("schedule.* has what there is"),
    f"{ZERO}stage": To("zero.stage", int),
    f"{ZERO}cpu_offload": To("zero.offload_optimizer", cpu_if),
    f"{ZERO}cpu_offload_params": To("zero.offload_params", cpu_if),
    f"{ZERO}offload_optimizer.device": To("zero.offload_optimizer"),
    f"{ZERO}offload_optimizer.nvme_path": To("zero.nvme_path"),
    f"{ZERO}offload_optimizer.*": Needless(PLANNED),
    f"{ZERO}offload_param.device": To("zero.offload_params"),
    f"{ZERO}offload_param.nvme_path": To("zero.nvme_path"),
    f"{ZERO}offload_param.*": Needless(PLANNED),
    **{ZERO + name: Needless(PLANNED) for name in (*SIZES, *COMMUNICATION)},
    **{ZERO + name: Needless("the model at the end is always whole") for name in SAVING},
    **{ZERO + name: Lost("nothing is compressed or cut by nodes") for name in COMPRESSION},
    "activation_checkpointing.*": Needless("train.activation_checkpointing, or the plan, decides"),
    "steps_per_print": To("train.log_every", int),
    "zero_allow_untested_optimizer": Needless("set where it is needed"),
    "zero_force_ds_cpu_optimizer": Needless("set where it is needed"),
    "tensor_parallel.*": Lost("a model is cut by ZeRO stage 3 alone"),
    "pipeline.*": Lost("a model is cut by ZeRO stage 3 alone"),
    "sequence_parallel_size": Lost("a sequence lies on one device"),
    "gradient_predivide_factor": Needless("the loss is the mean over all tokens of a step"),
    "prescale_gradients": Needless("the loss is the mean over all tokens of a step"),
    "communication_data_type": Needless("gradients travel in the precision that they have"),
    **{name: Needless("metrics.jsonl, tensorboard/ and the plan say it") for name in LOGS},
    "checkpoint.*": Needless("checkpoints are written while training goes on"),
    "compile.*": Needless("train.compile=true compiles"),
}

DEEPSPEED = Format(
    "DeepSpeed",
    frozenset(
        {
            "zero_optimization",
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
            "zero_allow_untested_optimizer",
        }
    ),
    TABLE,
    {"optimizer.type": "AdamW"},
    asks=("model=<model>", "data=<data>"),
)
