"""How a step is carried out, and how often a run is looked at and saved."""

from llmtrain.migrate.correspondence import (
    Case,
    Left,
    Made,
    Setting,
    Terms,
    is_off,
    sources,
    switched_on,
)

PRECISIONS = {
    "precision.pure_bf16": "bf16_pure",
    "precision.bf16": "bf16",
    "precision.fp16": "fp16",
    "precision.fp32": "fp32",
}

SHARDED = {"full_shard": 3, "hybrid_shard": 3, "shard_grad_op": 2, "hybrid_shard_zero2": 2}


def precision(terms: Terms, case: Case) -> Made:
    """The first that is switched on; where all are off, the plan decides."""
    given = {name: terms[name] for name in PRECISIONS if name in terms}
    for name, each in given.items():
        if not is_off(each.value):
            yield "train.precision", Setting(PRECISIONS[name], each.words)
            return
    bf16 = given.get("precision.bf16")
    if bf16 is not None and bf16.value is False:
        but = "the plan takes bf16 where the device multiplies it; train.precision=fp32 insists"
        yield "train.precision", Setting(None, bf16.words, but)


def attention(terms: Terms, case: Case) -> Made:
    """The implementation that is switched on."""
    for name in ("flash", "sdpa", "eager"):
        for given in switched_on(terms, [f"attention.{name}"]):
            yield "model.attention", Setting(name, given.words)


def evaluation(terms: Terms, case: Case) -> Made:
    """Steps between evaluations, which the Trainer has only where it is asked to."""
    yield from interval(terms, "evaluation", "train.eval_every", "no")


def saving(terms: Terms, case: Case) -> Made:
    """Steps between checkpoints."""
    yield from interval(terms, "saving", "checkpoint.every", "steps")


def interval(terms: Terms, name: str, key: str, usual: str) -> Made:
    """A number of steps; epochs and shares of the run have no counterpart."""
    strategy, steps = terms.get(f"{name}.strategy"), terms.get(f"{name}.steps")
    how = usual if strategy is None else str(strategy.value)
    why = f"{key} counts steps; null is five times a run"
    if how in ("epoch", "best") and strategy is not None:
        yield Left(strategy.key, strategy.value, why, False)
    elif how == "steps" and steps is not None and not is_off(steps.value):
        if float(steps.value) >= 1:
            given = [steps] if strategy is None else [strategy, steps]
            yield key, Setting(int(steps.value), sources(given))
        else:
            yield Left(steps.key, steps.value, why, False)


def fsdp(terms: Terms, case: Case) -> Made:
    """FSDP's sharding as a stage of ZeRO."""
    how, config = terms.get("fsdp.how"), terms.get("fsdp.config")
    values = config.value if config is not None and isinstance(config.value, dict) else {}
    plain = {name.removeprefix("fsdp_"): value for name, value in values.items()}
    words = [] if how is None else [str(word) for word in how.value]
    strategy = str(plain.get("sharding_strategy", "")).lower()
    if strategy:
        words.append(strategy)
    if "reshard_after_forward" in plain:  # FSDP 2
        words.append("full_shard" if plain["reshard_after_forward"] else "shard_grad_op")
    stages = [SHARDED[word] for word in words if word in SHARDED]
    source = sources(each for each in (how, config) if each is not None)
    if stages:
        yield "zero.stage", Setting(stages[-1], source, "ZeRO spreads what FSDP shards")
    if stages and ("offload" in words or plain.get("offload_params") in (True, "true")):
        yield "zero.offload_params", Setting("cpu", source)
        yield "zero.offload_optimizer", Setting("cpu", source)
