"""LLaMA-Factory's YAML: the Trainer's arguments, and keys of its own for model, data and method."""

from llmtrain.migrate.correspondence import Format, Lost, Needless, Table, Term, To, several
from llmtrain.migrate.format.hf_trainer import (
    DATA,
    DEFAULTS,
    FOLDER,
    KERNELS,
    LAUNCH,
    LOGS,
    RECOMPUTED,
    UNSAID,
    if_true,
)
from llmtrain.migrate.format.hf_trainer import TABLE as TRAINER

COPY = "give a local copy with it: model.path=<folder>"
NO_METHOD = "llmtrain has LoRA, DoRA, QLoRA and the training of all parameters"
SMALL_STATE = "optimizer=adamw8bit, or adapter=lora, keep less state"
ATTENTION = {"auto": "auto", "disabled": "eager", "sdpa": "sdpa", "fa2": "flash", "fa3": "flash"}

NEEDLESS = {
    DATA: (
        "buffer_size ignore_pad_token_for_loss media_dir overwrite_cache preprocessing_batch_size"
        " preprocessing_num_workers streaming tokenized_path"
    ),
    "held-out rows are evaluated: train.eval_every, train.eval_batches": (
        "compute_accuracy disable_shuffling eval_dataset_dir eval_num_beams eval_on_each_dataset"
        " predict_with_generate"
    ),
    FOLDER: "cache_dir early_stopping_steps export_dir low_cpu_mem_usage offload_folder",
    KERNELS: "enable_liger_kernel use_fast_tokenizer use_unsloth use_unsloth_gc use_v1_kernels",
    LAUNCH: (
        "print_param_status ray_init_kwargs ray_num_workers ray_run_name ray_storage_path"
        " resources_per_worker placement_strategy"
    ),
    LOGS: "include_effective_tokens_per_second plot_loss use_swanlab",
    "final/ holds the adapter; python -m llmtrain.export merges it": "create_new_adapter",
}

LOST = {
    "max_samples": "cut the file, or lower train.max_epochs",
    "adapter_name_or_path": "merge it first: python -m llmtrain.export <adapter> --to merged",
    "model_revision": COPY,
    "resize_vocab": COPY,
    "add_tokens": COPY,
    "add_special_tokens": COPY,
    "new_special_tokens_config": COPY,
    "rope_scaling": "model.config.<key> overrides the model's own configuration",
    "moe_aux_loss_coef": "model.config.router_aux_loss_coef overrides the model's own",
    "mixture_of_depths": NO_METHOD,
    "shift_attn": NO_METHOD,
    "split_special_tokens": "the tokenizer is used as it is stored",
    "upcast_layernorm": "train.precision=fp32 keeps everything in fp32",
    "upcast_lmhead_output": "train.precision=fp32 keeps everything in fp32",
    "use_rslora": "the scale is alpha / rank: set adapter.alpha to alpha * sqrt(rank)",
    "loraplus_lr_ratio": "both matrices learn at one rate",
    "pissa_init": "adapters begin as peft begins them: B is zero",
    "additional_target": "an adapter trains linear layers only; adapter=none trains everything",
    "use_galore": SMALL_STATE,
    "use_apollo": SMALL_STATE,
    "use_badam": SMALL_STATE,
    "use_adam_mini": SMALL_STATE,
    "use_llama_pro": NO_METHOD,
    "mix_strategy": "rows of all files are shuffled together",
    "interleave_probs": "rows of all files are shuffled together",
    "tool_format": "the tokenizer's own chat template writes tool calls",
    "enable_thinking": "the tokenizer's own chat template decides",
    "default_system": "put it into the rows, as a first turn of role system",
    "fp8": "take train.precision=bf16",
    "freeze_vision_tower": "models of text only",
    "image_max_pixels": "models of text only",
}

TABLE: Table = {
    **TRAINER,
    "model_name_or_path": Term("model.path"),
    "trust_remote_code": To("model.trust_remote_code", if_true),
    "stage": Term("mode.stage"),
    "finetuning_type": Term("adapter.kind"),
    "quantization_bit": Term("adapter.bits"),
    "quantization_method": Needless("bitsandbytes quantises, as nf4 with double quantisation"),
    "quantization_type": Needless("bitsandbytes quantises, as nf4 with double quantisation"),
    "double_quantization": Needless("bitsandbytes quantises, as nf4 with double quantisation"),
    "use_dora": Term("adapter.is_dora"),
    "lora_rank": Term("adapter.rank", int),
    "lora_alpha": To("adapter.alpha", float),
    "lora_dropout": To("adapter.dropout", float),
    "lora_target": Term("adapter.target", several),
    "dataset": Term("data.names", several),
    "dataset_dir": Term("data.folder"),
    "eval_dataset": Term("data.held_out_names", several),
    "template": Term("data.template"),
    "cutoff_len": To("train.seq_len", int),
    "packing": Term("data.packing"),
    "neat_packing": Term("data.packing_apart"),
    "train_on_prompt": Term("data.loss_on_all"),
    "mask_history": Term("data.loss_on_last"),
    "val_size": Term("data.held_out", float),
    "pure_bf16": Term("precision.pure_bf16"),
    "flash_attn": To("model.attention", ATTENTION.get),
    "disable_gradient_checkpointing": Needless(RECOMPUTED),
    "use_reentrant_gc": Needless(RECOMPUTED),
    "use_muon": Term("optimizer.is_muon"),
    **{key: Needless(why) for why, keys in NEEDLESS.items() for key in keys.split()},
    **{key: Lost(why) for key, why in LOST.items()},
}

LLAMA_FACTORY = Format(
    "LLaMA-Factory",
    frozenset({"finetuning_type", "stage", "cutoff_len", "model_name_or_path", "template"}),
    TABLE,
    DEFAULTS
    | {
        "stage": "sft",
        "finetuning_type": "lora",
        "cutoff_len": 2048,
        "lora_rank": 8,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset_dir": "data",
        "packing": False,
        "val_size": 0.0,
    },
    {key: value for key, value in UNSAID.items() if key not in ("logging_steps", "save_steps")},
)
