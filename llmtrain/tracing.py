"""The trace of a config's model: from the cache, or made now on tensors without values.

The model is the real one, built by transformers with the planned attention, adapter and loss, and
so are autograd and the code that runs; only the numbers are missing.
"""

import dataclasses
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.data.corpus import digest
from llmtrain.errors import ConfigError
from llmtrain.folder import read_cached, write_cached
from llmtrain.rough import rough_trace
from llmtrain.trace import Setting, Trace

if TYPE_CHECKING:
    from llmtrain.config import RunConfig

TRACE_FORMAT = 13  # raise it when what is traced changes, so that older caches are not read
LEAST_TOKENS = 512  # of a traced micro-batch: chunked kernels differ below their chunk
LOSS_CHUNKS = (1024, 4096)  # learned tokens: two chunks of the loss; eight, which grow beyond


def trace(config: "RunConfig", setting: Setting) -> Trace:
    """The trace of a config's model under a setting, from the cache where it was made before."""
    path = config.cache / "traces" / f"{fingerprint(config, setting)}.json"
    if (known := load(path)) is not None:
        return known
    try:
        made = traced(config, setting)
    except ConfigError:
        raise
    except Exception as error:  # a stranger's class may do what tensors without values cannot
        return rough_trace(config, setting, f"{type(error).__name__}: {error}")
    write_cached(path, made.to_json())
    load.cache_clear()
    return made


@cache
def load(path: Path) -> Trace | None:
    return read_cached(path, Trace.from_json)


def fingerprint(config: "RunConfig", setting: Setting) -> str:
    """A hash of all that a trace depends on."""
    teacher = config.teacher.fingerprint() if config.teacher is not None else None
    parts = [
        TRACE_FORMAT,
        config.model.fingerprint(),
        dataclasses.asdict(config.adapter),
        dataclasses.asdict(config.mode),
        teacher,
        config.train.seq_len,
        config.train.micro_batch,
        list(setting),
        importlib.metadata.version("torch"),
    ]
    return digest([json.dumps(parts, sort_keys=True, default=str)])


def traced(config: "RunConfig", setting: Setting) -> Trace:
    """Build the model without values and run it with each number of layers and micro-batch."""
    from llmtrain.tracer import Tracer

    with quiet():
        tracer = Tracer(config, setting)
        samples = [
            tracer.sample(num_layers, batch)
            for batch in batches_of(config, setting)
            for num_layers in tracer.depth.traced
        ]
    return Trace(tracer.depth.num_layers, tracer.weights(), tuple(samples))


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries say of a model that trains is no use to whoever plans it."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def batches_of(config: "RunConfig", setting: Setting) -> list[int]:
    """The micro-batches to trace: the one that was asked for, or those to draw lines through.

    A CPU's are small; a GPU's go on past where the chunks of the loss begin to grow.
    """
    if config.train.micro_batch is not None:
        return [config.train.micro_batch]
    if setting.device == "cpu":
        least = ceil(LEAST_TOKENS / config.train.seq_len)
        return [least, 2 * least]
    learned = config.train.seq_len * setting.learned_share
    few, many = (ceil(tokens / learned) for tokens in LOSS_CHUNKS)
    return sorted({few, many, 2 * many})
