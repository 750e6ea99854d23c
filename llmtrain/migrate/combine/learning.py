"""Batch, horizon, learning rate and update rule: what decides what a step learns."""

import math

from llmtrain.migrate.correspondence import (
    Case,
    Given,
    Left,
    Made,
    Setting,
    Terms,
    sources,
    switched_on,
)

SCHEDULES = {  # by its name there: ours, and in what it differs
    "linear": ("linear", ""),
    "cosine": ("cosine", ""),
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "cosine_with_min_lr": ("cosine", ""),
    "cosine_warmup_with_min_lr": ("cosine", ""),
    "warmup_stable_decay": ("wsd", "falls in a straight line over the last fifth of the steps"),
    "cosine_with_restarts": ("cosine", "falls once, without restarts"),
    "polynomial": ("linear", "falls in a straight line"),
    "inverse_sqrt": ("cosine", "falls as a cosine does"),
    "reduce_lr_on_plateau": ("constant", "does not look at the loss"),
    "rex": ("linear", "falls in a straight line"),
    "one_cycle": ("cosine", "falls as a cosine does"),
    "WarmupLR": ("constant", ""),
    "WarmupDecayLR": ("linear", ""),
    "WarmupCosineLR": ("cosine", ""),
    "OneCycle": ("cosine", "falls as a cosine does"),
}
STRANGE_SCHEDULE = ("cosine", "is the nearest that there is")

OF_SIGNS = "its momentum takes 4 bytes a parameter"
ON_HOST = "the plan decides whether its state lies on the host: zero.offload_optimizer=cpu"
OPTIMIZERS = {
    **dict.fromkeys(
        [
            "adam",
            "adamw",
            "adamw_anyprecision",
            "adamw_apex_fused",
            "adamw_hf",
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_torch_npu_fused",
            "adamw_torch_xla",
            "fusedadam",
        ],
        ("adamw", ""),
    ),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), ("adamw", ON_HOST)),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"), ("adamw8bit", "")),
    "paged_adamw_8bit": ("adamw8bit", "its state stays on the device"),
    **dict.fromkeys(("lion", "lion_32bit", "lion_pytorch", "paged_lion_32bit"), ("lion", "")),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), ("lion", OF_SIGNS)),
    "adafactor": ("adafactor", "its rate is relative to a weight's size: try optimizer.lr=1e-2"),
    "muon": (
        "muon",
        "its rate is in units of an update's spectral norm: try optimizer.lr=0.02; embeddings"
        " learn at optimizer.adam_lr",
    ),
}
STRANGE_OPTIMIZER = ("adamw", "is the nearest that there is")


def batch(terms: Terms, case: Case) -> Made:
    """Sequences of a step over all processes."""
    factors = switched_on(terms, ("batch.per_device", "batch.accumulation"))
    if total := terms.get("batch.total"):
        yield "train.global_batch", Setting(int(total.value), sources([total, *factors]))
        return
    if per_rank := terms.get("batch.per_rank_step"):
        factors = [per_rank]
    elif "batch.per_device" not in terms:
        return
    count = math.prod(int(factor.value) for factor in factors) * case.num_processes
    source = " x ".join(factor.words for factor in factors)
    processes = "1 process" if case.num_processes == 1 else f"{case.num_processes} processes"
    but = (
        "sequences of a step over all processes (--num-processes says how many), which the"
        " plan divides"
    )
    yield "train.global_batch", Setting(count, f"{source} x {processes}", but)


def horizon(terms: Terms, case: Case) -> Made:
    """Steps where there are any, else epochs."""
    steps, epochs = terms.get("horizon.steps"), terms.get("horizon.epochs")
    if steps is not None and int(steps.value) > 0:
        yield "train.max_steps", Setting(int(steps.value), steps.words)
    elif epochs is not None:
        yield "train.max_epochs", Setting(float(epochs.value), epochs.words)


def warmup(terms: Terms, case: Case) -> Made:
    """A number of steps, or below 1 a share of them; what a file says goes before a default."""
    kind = terms.get("schedule.kind")
    if kind is not None and kind.value == "constant":
        yield "schedule.warmup_steps", Setting(0, kind.words)
        return
    given = [terms[name] for name in ("warmup.steps", "warmup.ratio") if name in terms]
    given = [each for each in given if not each.is_default] or given
    if not given:
        return
    chosen = next((each for each in given if float(each.value) > 0), given[0])
    number, but = float(chosen.value), logarithmic(terms)
    if 0 < number < 1:
        yield "schedule.warmup_fraction", Setting(number, chosen.words, but)
    else:
        yield "schedule.warmup_steps", Setting(int(number), chosen.words, but)


def logarithmic(terms: Terms) -> str:
    """What DeepSpeed's warm-ups are, unless they say linear."""
    kind, shape = terms.get("schedule.kind"), terms.get("warmup.type")
    is_log = kind is not None and str(kind.value).startswith("Warmup")
    is_log = is_log and (shape is None or shape.value == "log")
    return "rises in a straight line, and there as a logarithm" if is_log else ""


def schedule(terms: Terms, case: Case) -> Made:
    """The shape of the learning rate, and what it ends at."""
    kind = terms.get("schedule.kind")
    if kind is None:
        return
    ours, but = SCHEDULES.get(str(kind.value), STRANGE_SCHEDULE)
    yield "schedule", Setting(ours, kind.words, but)
    if ours in ("cosine", "wsd"):
        yield "schedule.final_factor", final_factor(terms, kind)


def final_factor(terms: Terms, kind: Given) -> Setting:
    """The share of the rate that a run ends at; nothing, unless a file says otherwise."""
    if given := terms.get("schedule.final_factor"):
        return Setting(float(given.value), given.words)
    options = terms.get("schedule.options")
    values = options.value if options and isinstance(options.value, dict) else {}
    for name in ("min_lr_rate", "min_lr_ratio"):
        if values.get(name) is not None:
            return Setting(float(values[name]), f"{name}={values[name]}")
    if values.get("min_lr") is not None and "rate" in terms:
        factor = float(values["min_lr"]) / float(terms["rate"].value)
        return Setting(factor, f"min_lr={values['min_lr']} / {terms['rate'].words}")
    return Setting(0.0, kind.words)


def optimizer(terms: Terms, case: Case) -> Made:
    """The update rule; its rate is a setting of its own."""
    kind = terms.get("optimizer.kind")
    for name in ("adafactor", "muon"):
        for switch in switched_on(terms, [f"optimizer.is_{name}"]):
            kind = Given(switch.key, name, False)
    if kind is None:
        return
    ours, but = OPTIMIZERS.get(str(kind.value).lower(), STRANGE_OPTIMIZER)
    yield "optimizer", Setting(ours, kind.words, but)
    if betas := terms.get("optimizer.betas"):
        for name, value in zip(("beta1", "beta2"), betas.value, strict=False):
            yield f"optimizer.{name}", Setting(float(value), betas.words)
    if clip := terms.get("optimizer.grad_clip"):
        yield from clipping(clip, ours)


def clipping(clip: Given, optimizer: str) -> Made:
    """The norm that gradients are cut to; Muon's updates have a norm of their own."""
    if optimizer != "muon":
        yield "train.grad_clip", Setting(float(clip.value), clip.words)
    elif not clip.is_default:
        yield Left(clip.key, clip.value, "Muon's updates have a norm of their own", True)


def rate(terms: Terms, case: Case) -> Made:
    """The highest learning rate, from the optimizer or else from its schedule."""
    if given := switched_on(terms, ("rate", "schedule.peak_lr")):
        yield "optimizer.lr", Setting(float(given[0].value), sources(given))
