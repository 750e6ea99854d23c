"""axolotl's YAML."""

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
from llmtrain.migrate.format.hf_trainer import (
    DATA,
    EVALUATION,
    FOLDER,
    HUB,
    KERNELS,
    LAUNCH,
    LOGS,
    RECOMPUTED,
    if_true,
    recomputation,
    whole,
)
from llmtrain.migrate.format.hf_trainer import DEFAULTS as TRAINER_DEFAULTS
from llmtrain.migrate.format.hf_trainer import LOST as TRAINER_LOST
from llmtrain.migrate.format.llama_factory import COPY, NO_METHOD

ATTENTION = {
    "flash_attention": "flash",
    "xformers_attention": "auto",
    "sdp_attention": "sdpa",
    "flex_attention": "auto",
    "eager_attention": "eager",
}
NAMED_ATTENTION = {"flash": "flash", "flash_attention_2": "flash", "sdpa": "sdpa", "eager": "eager"}

NEEDLESS = {
    DATA: (
        "accelerator_config curriculum_sampling dataloader_drop_last dataloader_num_workers"
        " dataloader_pin_memory dataloader_prefetch_factor dataset_keep_in_memory"
        " dataset_prepared_path dataset_processes dataset_num_proc group_by_length"
        " multipack_real_batches pad_to_sequence_len pretrain_multipack_buffer_size"
        " remove_unused_columns sample_packing_bin_size sample_packing_group_size"
        " sample_packing_sequentially shuffle_merged_datasets skip_prepare_dataset streaming"
        " pretrain_multipack_attn pretraining_sample_concatenation batch_flattening"
        " eval_sample_packing"
    ),
    EVALUATION: (
        "bench_dataset do_bench_eval do_causal_lm_eval eval_batch_size eval_causal_lm_metrics"
        " eval_max_new_tokens eval_strategy eval_table_size greater_is_better"
        " metric_for_best_model"
    ),
    "a run is evaluated and saved five times, or every train.eval_every, checkpoint.every steps": (
        "evals_per_epoch saves_per_epoch save_strategy"
    ),
    FOLDER: (
        "auto_resume_from_checkpoints dynamic_checkpoint load_best_model_at_end output_dir"
        " resume_from_checkpoint save_only_model save_safetensors strict"
    ),
    HUB: "hf_use_auth_token hub_model_id hub_strategy push_dataset_to_hub",
    KERNELS: (
        "cut_cross_entropy flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_fuse_qkv"
        " flash_attn_rms_norm flash_optimum liger_fused_linear_cross_entropy liger_glu_activation"
        " liger_layer_norm liger_rms_norm liger_rope liger_swiglu lora_mlp_kernel lora_o_kernel"
        " lora_qkv_kernel plugins tf32 torch_compile_backend torch_compile_mode"
        " unsloth_cross_entropy_loss use_kernels"
    ),
    LAUNCH: (
        "auto_find_batch_size ddp ddp_broadcast_buffers ddp_bucket_cap_mb"
        " ddp_find_unused_parameters ddp_timeout debug device device_map gc_steps gpu_memory_limit"
        " local_rank low_cpu_mem_usage lora_on_cpu max_memory num_processes"
        " qlora_sharded_model_loading ray_num_workers ray_run_name resources_per_worker use_ray"
        " world_size"
    ),
    RECOMPUTED: "activation_offloading gradient_checkpointing_kwargs",
    LOGS: (
        "include_tokens_per_second profiler_steps use_tensorboard use_wandb wandb_entity"
        " wandb_log_model wandb_mode wandb_name wandb_project wandb_run_id wandb_watch"
        " mlflow_experiment_name mlflow_tracking_uri use_mlflow comet_project_name use_comet"
        " loss_watchdog_patience loss_watchdog_threshold use_otel_metrics otel_metrics_host"
        " otel_metrics_port"
    ),
    "transformers finds model and tokenizer by the configuration": (
        "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model"
        " is_qwen_derived_model model_type tokenizer_type tokenizer_use_fast tokenizer_legacy"
        " lora_fan_in_fan_out"
    ),
    "the config.json of base_model is read": "base_model_config",
}

LOST = {
    key: TRAINER_LOST[key] for key in ("neftune_noise_alpha", "optim_args", "optim_target_modules")
} | {
    "lora_model_dir": "merge it first: python -m llmtrain.export <adapter> --to merged",
    "lora_modules_to_save": "an adapter trains linear layers only; adapter=none trains everything",
    "lora_target_parameters": "adapter.target_modules names linear layers",
    "peft_use_rslora": "the scale is alpha / rank: set adapter.alpha to alpha * sqrt(rank)",
    "peft_layers_to_transform": "every layer is adapted",
    "peft_init_lora_weights": "adapters begin as peft begins them: B is zero",
    "loraplus_lr_ratio": "both matrices learn at one rate",
    "relora": NO_METHOD,
    "relora_steps": NO_METHOD,
    "unfrozen_parameters": NO_METHOD,
    "gptq": "take adapter=qlora over the whole weights",
    "bnb_config_kwargs": "bitsandbytes quantises, as nf4 with double quantisation",
    "revision_of_model": COPY,
    "tokenizer_config": COPY,
    "tokens": COPY,
    "special_tokens.*": COPY,
    "added_tokens_overrides": COPY,
    "resize_token_embeddings_to_32x": COPY,
    "overrides_of_model_config": "model.config.<key> overrides the model's own configuration",
    "overrides_of_model_kwargs": "model.config.<key> overrides the model's own configuration",
    "default_system_message": "put it into the rows, as a first turn of role system",
    "eot_tokens": "the end of a turn is the chat template's",
    "chat_template_jinja": "write it to a file: data.template=<file>.jinja",
    "dataset_exact_deduplication": "remove repeated rows from the file",
    "min_sample_len": "remove short rows from the file",
    "early_stopping_patience": "best/ holds the model of the lowest held-out loss",
    "embedding_lr": "one rate for all; optimizer=muon has optimizer.adam_lr",
    "lr_groups": "one rate for all; optimizer=muon has optimizer.adam_lr",
    "cosine_constant_lr_ratio": "schedule=wsd holds the rate before it falls",
    "lr_quadratic_warmup": "a warm-up is linear",
    "s2_attention": NO_METHOD,
    "use_pose": NO_METHOD,
    "fp8": "take train.precision=bf16",
    "sequence_parallel_degree": "a sequence lies on one device",
    "context_parallel_size": "a sequence lies on one device",
    "tensor_parallel_size": "a model is cut by ZeRO stage 3 alone",
    "qat": "take adapter=qlora",
}

TABLE: Table = {
    "base_model": Term("model.path"),
    "trust_remote_code": To("model.trust_remote_code", if_true),
    "datasets": Term("data.rows", same),
    "pretraining_dataset": Term("data.texts", same),
    "test_datasets": Term("data.held_out_rows", same),
    "rl": Term("mode.stage"),
    "reward_model": Term("mode.stage"),
    "process_reward_model": Term("mode.stage"),
    "adapter": Term("adapter.kind"),
    "load_in_4bit": Term("adapter.in_4_bits"),
    "load_in_8bit": Term("adapter.in_8_bits"),
    "peft_use_dora": Term("adapter.is_dora"),
    "lora_r": Term("adapter.rank", int),
    "lora_alpha": To("adapter.alpha", float),
    "lora_dropout": To("adapter.dropout", float),
    "lora_target_modules": Term("adapter.target", several),
    "lora_target_linear": Term("adapter.is_everywhere"),
    "sequence_len": To("train.seq_len", int),
    "sample_packing": Term("data.packing"),
    "chat_template": Term("data.template"),
    "train_on_inputs": Term("data.loss_on_all"),
    "val_set_size": Term("data.held_out", float),
    "micro_batch_size": Term("batch.per_device", int),
    "gradient_accumulation_steps": Term("batch.accumulation", int),
    "batch_size": Term("batch.per_rank_step", int),
    "num_epochs": Term("horizon.epochs", float),
    "max_steps": Term("horizon.steps", int),
    "learning_rate": Term("rate", float),
    "optimizer": Term("optimizer.kind"),
    "weight_decay": To("optimizer.weight_decay", float),
    "adam_beta1": To("optimizer.beta1", float),
    "adam_beta2": To("optimizer.beta2", float),
    "adam_epsilon": To("optimizer.eps", float),
    "max_grad_norm": Term("optimizer.grad_clip", float),
    "lr_scheduler": Term("schedule.kind"),
    "lr_scheduler_kwargs": Term("schedule.options", same),
    "cosine_min_lr_ratio": Term("schedule.final_factor", float),
    "warmup_steps": Term("warmup.steps", float),
    "warmup_ratio": Term("warmup.ratio", float),
    "bf16": Term("precision.bf16"),
    "fp16": Term("precision.fp16"),
    "bfloat16": Term("precision.pure_bf16"),
    "float16": Term("precision.fp16"),
    "float32": Term("precision.fp32"),
    "gradient_checkpointing": To("train.activation_checkpointing", recomputation),
    "torch_compile": To("train.compile", if_true),
    "seed": To("seed", int),
    "logging_steps": To("train.log_every", whole),
    "eval_steps": To("train.eval_every", whole),
    "save_steps": To("checkpoint.every", whole),
    "save_total_limit": To("checkpoint.keep", whole),
    "deepspeed": Within(DEEPSPEED),
    "fsdp": Term("fsdp.how", several),
    "fsdp_config": Term("fsdp.config", same),
    "fsdp_version": Needless("ZeRO spreads the model"),
    "fsdp_final_state_dict_type": Needless("the model at the end is always whole"),
    "special_tokens.pad_token": Needless("what is padded is neither read nor learned"),
    "attention": To("model.attention", NAMED_ATTENTION.get),
    "attn_implementation": To("model.attention", NAMED_ATTENTION.get),
    **{key: Term(f"attention.{name}") for key, name in ATTENTION.items()},
    **{key: Needless(why) for why, keys in NEEDLESS.items() for key in keys.split()},
    **{key: Lost(why) for key, why in LOST.items()},
}

DEFAULTS: dict[str, Any] = {
    key: TRAINER_DEFAULTS[key]
    for key in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed")
} | {
    "sequence_len": 512,
    "sample_packing": False,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1.0,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "lora_dropout": 0.0,
    "val_set_size": 0.0,
    "bf16": "auto",
}

AXOLOTL = Format("axolotl", frozenset({"base_model"}), TABLE, DEFAULTS)
