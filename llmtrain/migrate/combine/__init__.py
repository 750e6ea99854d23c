"""Settings that several values make together, and those whose names have to be looked up.

Each function takes what a file says by the terms of the tables, and gives settings of ours.
"""

from collections.abc import Callable

from llmtrain.migrate.combine.learning import batch, horizon, optimizer, rate, schedule, warmup
from llmtrain.migrate.combine.method import adapter, mode, model
from llmtrain.migrate.combine.rows import data
from llmtrain.migrate.combine.running import attention, evaluation, fsdp, precision, saving
from llmtrain.migrate.correspondence import Case, Made, Terms

COMBINE: tuple[Callable[[Terms, Case], Made], ...] = (
    model,
    mode,
    data,
    batch,
    horizon,
    rate,
    schedule,
    warmup,
    optimizer,
    adapter,
    precision,
    attention,
    evaluation,
    saving,
    fsdp,
)
