"""How long a run is, in steps, and what happens at which of them."""

import math
from dataclasses import dataclass

from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.schedule.base import Schedule

DEBUG_STEPS = 5


@dataclass(frozen=True)
class Corpus:
    """What the plan knows of the corpus; ``is_estimate`` until it has been prepared.

    Tokens are those that are read, sequences those that they make at the run's length. Of rows
    longer than that, ``num_cut`` lose their end and ``num_left_out`` more have no answer left.
    After ``most_sequences`` a source of a mixture is dry and the run ends.
    ``learned_share`` is that of all positions whose token is learned; of an estimate the most.
    """

    name: str
    num_train_tokens: int
    num_train_sequences: int
    num_held_out_sequences: int
    is_estimate: bool
    fingerprint: str | None
    learned_share: float = 1.0
    num_rows: int | None = None
    num_cut: int = 0
    num_left_out: int = 0
    num_skipped: int = 0
    first_skipped: str | None = None
    most_sequences: int | None = None

    @property
    def tokens_per_sequence(self) -> float:
        """The mean, filler left out."""
        return self.num_train_tokens / self.num_train_sequences


@dataclass(frozen=True)
class Horizon:
    """Steps and tokens of a run, and the steps at which it warms up, evaluates and saves."""

    tokens_per_step: int
    num_steps: int
    num_tokens: int
    num_epochs: float
    warmup_steps: int
    eval_every: int
    eval_sequences: int
    final_eval_sequences: int
    checkpoint_every: int


def choose_horizon(config: RunConfig, data: Corpus, reasons: dict[str, str]) -> Horizon:
    """The horizon that was asked for, or the recipe's; a fifth of it between evaluations."""
    num_steps = count_steps(config, data, reasons)
    tokens_per_step = round(config.train.global_batch * data.tokens_per_sequence)
    fifth = -(-num_steps // 5)
    eval_every = config.train.eval_every or fifth
    eval_sequences, final_eval_sequences = count_eval_sequences(config, data, num_steps, eval_every)
    warmup_steps = count_warmup_steps(config.schedule, num_steps, reasons)
    return Horizon(
        tokens_per_step=tokens_per_step,
        num_steps=num_steps,
        num_tokens=num_steps * tokens_per_step,
        num_epochs=num_steps * config.train.global_batch / data.num_train_sequences,
        warmup_steps=warmup_steps,
        eval_every=eval_every,
        eval_sequences=eval_sequences,
        final_eval_sequences=final_eval_sequences,
        checkpoint_every=config.checkpoint.every or min(500, fifth),
    )


def count_steps(config: RunConfig, data: Corpus, reasons: dict[str, str]) -> int:
    """The horizon in steps: what was given, unless a source that ends the run is dry before."""
    asked = steps_asked(config, data, reasons)
    if data.most_sequences is None or config.debug:
        return asked
    most = max(1, data.most_sequences // config.train.global_batch)
    if most < asked:
        reasons["num_steps"] = "a source of the mixture has been read (data.when_dry=stop)"
    return min(asked, most)


def steps_asked(config: RunConfig, data: Corpus, reasons: dict[str, str]) -> int:
    """The horizon in steps, from whichever of steps, tokens or epochs was given."""
    train, recipe = config.train, config.mode.recipe
    if config.debug:
        reasons["num_steps"] = "debug"
        return DEBUG_STEPS
    if train.max_steps:
        reasons["num_steps"] = "train.max_steps"
        return train.max_steps
    if train.max_tokens or train.max_epochs:
        reasons["num_steps"] = "train.max_tokens" if train.max_tokens else "train.max_epochs"
        horizon = (train.max_tokens, train.max_epochs)
    else:
        reasons["num_steps"] = "the recipe's horizon"
        horizon = (recipe.max_tokens, recipe.max_epochs)
    max_tokens, max_epochs = horizon
    if max_tokens:
        return max(1, math.ceil(max_tokens / (train.global_batch * data.tokens_per_sequence)))
    return max(1, math.ceil((max_epochs or 1.0) * data.num_train_sequences / train.global_batch))


def count_warmup_steps(schedule: Schedule, num_steps: int, reasons: dict[str, str]) -> int:
    """The steps asked for, or a share of the run, 5 % where nothing is said."""
    steps, fraction = schedule.warmup_steps, schedule.warmup_fraction
    if steps is not None and fraction is not None:
        reason = "and schedule.warmup_fraction are both given"
        raise ConfigError("schedule.warmup_steps", steps, reason, "give one of them")
    if fraction is not None:
        reasons["warmup_steps"] = "schedule.warmup_fraction"
        return math.ceil(fraction * num_steps)
    if steps is None:
        reasons["warmup_steps"] = "5 % of the steps"
        return num_steps // 20
    if steps > num_steps:
        reason = f"is more than the run's {num_steps} steps"
        raise ConfigError("schedule.warmup_steps", steps, reason, "warm up for fewer")
    return steps


def count_eval_sequences(
    config: RunConfig, data: Corpus, num_steps: int, eval_every: int
) -> tuple[int, int]:
    """Held-out sequences of an evaluation on the way, and of the closing one.

    On the way, evaluating costs about 2 % of training (a forward pass is a third of a step); at the
    end everything is read, unless that were more than a fifth of what was trained on.
    """
    batch = config.train.global_batch
    everything = data.num_held_out_sequences
    if config.train.eval_batches is not None:
        asked = min(everything, config.train.eval_batches * batch)
        return asked, everything if num_steps * batch >= 5 * everything else asked
    on_the_way = min(everything, max(batch, eval_every * batch // 16))
    closing = min(everything, max(on_the_way, num_steps * batch // 5))
    return on_the_way, closing
