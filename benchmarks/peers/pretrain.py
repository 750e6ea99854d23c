"""Peers on the work of benchmarks/speed.py: `python pretrain.py CONTESTANT JOB.json`.

The job names the device, the model's folder, the file of tokens [steps, batch, length + 1],
threads and the optimizer's settings. Contestants: reference and reference-of-trainer (fp32 loops),
loop, loop-compiled, trainer, trainer-compiled, deepspeed, litgpt, mambapy, associative.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from turn import Step, Turns

Job = dict[str, Any]


def main(contestant: str, path: str) -> None:
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    turns = Turns()
    if contestant.startswith("trainer"):
        trainer(job, turns, is_compiled=contestant.endswith("compiled"))
    elif contestant == "deepspeed":
        turns.take(deepspeed_step(job))
    elif contestant == "litgpt":
        turns.take(litgpt_step(job))
    else:
        turns.take(loop_step(job, contestant))


def batches(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """The inputs [B, L] and the labels [B, L] of each step, and from the first on again."""
    steps = np.load(job["tokens"], mmap_mode="r")
    while True:
        for step_BL in steps:
            tokens_BL = torch.from_numpy(step_BL.astype(np.int64)).to(job["device"])
            yield tokens_BL[:, :-1], tokens_BL[:, 1:]


def load(job: Job, dtype: torch.dtype, **changed: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, **changed)
    model.config.use_cache = False
    return model.to(job["device"]).train()


def adamw(model: Any, job: Job, **options: Any) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": job["weight_decay"]},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=job["lr"], betas=tuple(job["betas"]), **options)


def loop_step(job: Job, contestant: str) -> Step:
    """A plain loop in fp32 (reference) or under autocast; the scans are options of Mamba's."""
    changed = {"mambapy": {"use_mambapy": True}, "associative": {"use_associative_scan": True}}
    changed |= {"reference": job["reference"]}
    model = load(job, torch.float32, **changed.get(contestant, {}))
    forward = model
    if "compiled" in contestant or contestant == "associative":
        forward = torch.compile(model)
    optimizer = adamw(model, job, fused=True)
    is_autocast = not contestant.startswith("reference")
    last = -1 if contestant == "reference-of-trainer" else None  # its loss has no last target
    source = batches(job)

    def step() -> tuple[float, float]:
        inputs_BL, labels_BL = next(source)
        with torch.autocast(job["device"], torch.bfloat16, enabled=is_autocast):
            logits_BLV = forward(input_ids=inputs_BL, use_cache=False).logits
            rows = (logits_BLV[:, :last], labels_BL[:, :last])
            loss = cross_entropy(rows[0].flatten(0, 1).float(), rows[1].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    return step


def deepspeed_step(job: Job) -> Step:
    """DeepSpeed's engine at stage 0 in bf16, as its own tutorial has it."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": str(job["port"]), "DS_ACCELERATOR": job["device"]})
    import deepspeed

    model = load(job, torch.float32)
    settings = {
        "train_micro_batch_size_per_gpu": job["batch"],
        "bf16": {"enabled": True},
        "gradient_clipping": job["grad_clip"],
        "zero_optimization": {"stage": 0},
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles for a minute
    backend = "gloo" if job["device"] == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model, job), config=settings)
    source = batches(job)

    def step() -> tuple[float, float]:
        inputs_BL, labels_BL = next(source)
        logits_BLV = engine(input_ids=inputs_BL, use_cache=False).logits
        loss = cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten())
        engine.backward(loss)
        engine.step()
        return float(loss.item()), float(engine.get_global_grad_norm())

    return step


def litgpt_step(job: Job) -> Step:
    """litgpt's own model, loss and precision by Fabric, compiled as its `pretrain` does."""
    import lightning
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    lightning.seed_everything(0)
    fabric = lightning.Fabric(accelerator=job["device"], devices=1, precision="bf16-mixed")
    theirs = load(job, torch.float32)
    model, weights = GPT(litgpt_config(theirs.config)), {}
    copy_weights_hf_llama(model.config, {}, weights, theirs.state_dict())
    model.load_state_dict(weights)
    if theirs.config.tie_word_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    model = fabric.setup(torch.compile(model))
    is_gpu = job["device"] != "cpu"
    optimizer = fabric.setup_optimizers(adamw(model, job, fused=is_gpu))
    source = batches(job)

    def step() -> tuple[float, float]:
        inputs_BL, labels_BL = next(source)
        loss = chunked_cross_entropy(model(inputs_BL), labels_BL)
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=job["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def litgpt_config(theirs: Any) -> Any:
    """The same sizes in litgpt's words."""
    from litgpt.config import Config

    return Config(
        block_size=theirs.max_position_embeddings,
        n_layer=theirs.num_hidden_layers,
        n_embd=theirs.hidden_size,
        vocab_size=theirs.vocab_size,
        padded_vocab_size=theirs.vocab_size,
        n_head=theirs.num_attention_heads,
        head_size=theirs.head_dim,
        n_query_groups=theirs.num_key_value_heads,
        intermediate_size=theirs.intermediate_size,
        rope_base=int(theirs.rope_parameters["rope_theta"]),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=theirs.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
    )


def trainer(job: Job, turns: Turns, is_compiled: bool) -> None:
    """Hugging Face's Trainer: its defaults, or with the compilation that its documentation names.

    Labels are the inputs, as a user of it gives them; its loss leaves each row's last target out.
    """
    from torch.utils.data import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    set_seed(0)
    steps = np.load(job["tokens"], mmap_mode="r")
    rows = steps.reshape(-1, steps.shape[-1])

    class Rows(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = torch.from_numpy(rows[index, :-1].astype(np.int64))
            return {"input_ids": row, "labels": row}

    asked = turns.asked()

    class Turn(TrainerCallback):
        """Waits between turns, inside of the trainer's own loop."""

        left = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self.left:
                self.left = next(asked, 0) or sys.exit(0)
                self.steps: list[tuple[float, float]] = []
                self.begun = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                self.steps.append((float(logs["loss"]), float(logs["grad_norm"])))
                self.left -= 1
                if not self.left:
                    turns.answer(time.perf_counter() - self.begun, self.steps)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(range(len(rows)))

    settings = TrainingArguments(
        output_dir=job["scratch"],
        use_cpu=job["device"] == "cpu",
        bf16=True,
        per_device_train_batch_size=job["batch"],
        learning_rate=job["lr"],
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        weight_decay=job["weight_decay"],
        max_grad_norm=job["grad_clip"],
        lr_scheduler_type="constant",
        max_steps=10**6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        torch_compile=is_compiled,
    )
    model = load(job, torch.float32)
    InOrder(model=model, args=settings, train_dataset=Rows(), callbacks=[Turn()]).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
