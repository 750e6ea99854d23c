"""What a rank imports before its first step, for a process that ranks are forks of."""

import importlib
import threading

NAMES = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "deepspeed",
    "transformers",
    "llmtrain.data.shards",
    "llmtrain.engine",
    "llmtrain.evaluation",
    "llmtrain.job",
    "llmtrain.starting",
    "llmtrain.step",
)

for name in NAMES:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
