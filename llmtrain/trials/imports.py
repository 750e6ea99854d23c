"""What a rank imports before its first step, for a process that ranks are forks of."""

import gc
import importlib
import os
import signal
import threading

from llmtrain.imports import import_deepspeed
from llmtrain.trials.trainer import DEAF

os.setsid()  # a signal to the sweep and all its kind is for the sweep to act upon
for number in DEAF:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF)

NAMES = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "setuptools",
    "transformers",
    "transformers.models.auto.tokenization_auto",
    "llmtrain.data.shards",
    "llmtrain.engine",
    "llmtrain.evaluation",
    "llmtrain.job",
    "llmtrain.starting",
    "llmtrain.step",
)

import_deepspeed(os.environ.get("DS_ACCELERATOR", "cpu"))  # none: a start after a death
for name in NAMES:
    importlib.import_module(name)
if os.environ.get("DS_ACCELERATOR") == "cpu":  # elsewhere it asks for GPUs, which forks then cannot
    assert importlib.import_module("deepspeed.ops").__compatible_ops__  # it asks a compiler, once
gc.freeze()  # a fork that looks for garbage would read, and copy, all that was imported
assert threading.active_count() == 1, threading.enumerate()
