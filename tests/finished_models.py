"""Finished models in miniature: real architectures with random weights, an adapter, and runs."""

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmtrain.compose import composed
from llmtrain.folder import RunFolder, write_json, write_text

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [f"What is {a} plus {b}?" for a in range(5) for b in range(6)]
ANSWERS = [f"It is {a + b}." for a in range(5) for b in range(6)]
RAFT_ROWS = [
    {
        "question": f"Where is the cup of number {n}?",
        "documents": [
            {"content": f"The cup of number {n} stands on shelf {n}.", "type": "oracle"},
            {"content": "Cups are made of clay.", "type": "distractor"},
        ],
        "teacher_answer": f'## Evidence\n"The cup of number {n} stands on shelf {n}." [1]\n'
        f"## Answer\nOn shelf {n}.",
    }
    for n in range(20)
]


@dataclass(frozen=True)
class Models:
    """Folders below ``root``, each made when it is first asked for."""

    root: Path

    @cached_property
    def llama(self) -> Path:
        """A Llama whose tokenizer has a chat template and ends turns by ``<|im_end|>``."""
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        path = self.save("llama", hidden_size=64, intermediate_size=128, **sizes)
        self.tokenizer(TEMPLATE).save_pretrained(path)
        return path

    @cached_property
    def gpt2(self) -> Path:
        """A GPT-2 with 128 positions, and a tokenizer without padding and template."""
        path = self.save("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=128)
        self.tokenizer(None).save_pretrained(path)
        return path

    @cached_property
    def coarse(self) -> Path:
        """The same GPT-2 with other tokens: hardly more than bytes."""
        path = self.root / "coarse"
        shutil.copytree(self.gpt2, path)
        self.tokenizer(None, vocab_size=262).save_pretrained(path)
        return path

    @cached_property
    def mamba(self) -> Path:
        path = self.save("mamba", hidden_size=32, num_hidden_layers=2, state_size=8)
        self.tokenizer(None).save_pretrained(path)
        return path

    @cached_property
    def adapter(self) -> Path:
        return self.adapter_on(self.llama, ["q_proj", "down_proj"])

    @cached_property
    def gpt2_adapter(self) -> Path:
        return self.adapter_on(self.gpt2, ["c_attn"], fan_in_fan_out=True)

    @cached_property
    def chat_rows(self) -> Path:
        rows = zip(QUESTIONS, ANSWERS, strict=True)
        turns = [[("user", question), ("assistant", answer)] for question, answer in rows]
        return self.write_rows(
            "chat.jsonl",
            [{"messages": [{"role": r, "content": c} for r, c in pair]} for pair in turns],
        )

    @cached_property
    def texts(self) -> Path:
        rows = [
            {"text": f"{question} {answer} " * 5}
            for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        ]
        return self.write_rows("texts.jsonl", rows)

    @cached_property
    def text_run(self) -> Path:
        """A pretraining run on texts, which ended with the Llama."""
        words = ["data=text", f"data.path={self.texts}", "data.held_out_every=4"]
        return self.run("text", self.llama, *words, f"model.path={self.llama}")

    @cached_property
    def raft_run(self) -> Path:
        words = ["mode=distill", "data=raft", "prompt@data.prompt=en", "train.seq_len=1024"]
        words += [f"data.path={self.raft_rows}", "data.validation_fraction=0.3"]
        return self.run("raft", self.llama, *words, f"model.path={self.llama}")

    def chat_run(self, name: str, final: Path, base: Path, *overrides: str) -> Path:
        words = ["mode=sft", "data=chat", f"data.path={self.chat_rows}"]
        words += ["data.validation_fraction=0.4", f"model.path={base}"]
        return self.run(name, final, *words, *overrides)

    @cached_property
    def raft_rows(self) -> Path:
        return self.write_rows("raft.jsonl", RAFT_ROWS)

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.root / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def tokenizer(self, template: str | None, vocab_size: int = 300) -> Any:
        """A byte-level BPE."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=letters,
            show_progress=False,
        )
        raw.train_from_iterator(QUESTIONS + ANSWERS, trainer)
        opened = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
        opened.chat_template = template
        return opened

    def save(self, architecture: str, **sizes: Any) -> Path:
        """A model with weights that are large enough to have opinions."""
        from transformers import AutoConfig, AutoModelForCausalLM

        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints when it is imported
        torch.manual_seed(0)
        tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
        config = AutoConfig.for_model(architecture, vocab_size=304, **sizes, **tokens)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for param in model.parameters():
                if param.ndim == 2:
                    param.mul_(4)
        model.save_pretrained(self.root / architecture)
        return self.root / architecture

    def adapter_on(self, base: Path, modules: list[str], **options: Any) -> Path:
        """A LoRA that changes what its base says."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", **options)
        with warnings.catch_warnings():  # peft asks transformers by a name that it is giving up
            warnings.simplefilter("ignore", FutureWarning)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, param in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, std=0.3)
        path = self.root / f"{base.name}_adapter"
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(base).save_pretrained(path)
        return path

    def run(self, name: str, final: Path, *overrides: str) -> Path:
        """A run folder as training leaves it, with ``final`` as its model."""
        from llmtrain.data.shards import prepare
        from llmtrain.plan import make_plan

        words = [f"name={name}", f"cache_root={self.root / 'cache'}", "hardware=cpux1"]
        config = composed([*words, "model=pretrained", "train.seq_len=64", *overrides])
        manifest = prepare(config.data, config.cache, config.tokenizer_path, progress=False)
        folder = RunFolder(self.root / name)
        write_text(folder.config, config.to_yaml())
        write_json(folder.plan, make_plan(config, manifest).to_json())
        write_json(folder.manifest, {"folder": str(manifest.folder)})
        shutil.copytree(final, folder.final)
        return folder.path
