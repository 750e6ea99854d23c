"""What is trained: the model, the mode, the adapter."""

from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.migrate.correspondence import (
    Case,
    Given,
    Left,
    Made,
    Setting,
    Terms,
    is_off,
    sources,
    switched_on,
)

MODES = {"sft": "sft", "pt": "pretrain"}
ADAPTERS = {"lora": "lora", "qlora": "qlora", "full": "none"}
EVERYWHERE = {"all", "all-linear", "all_linear", "auto"}
SWITCHES = ("adapter.bits", "adapter.in_4_bits", "adapter.in_8_bits", "adapter.is_dora")


def model(terms: Terms, case: Case) -> Made:
    """Stored weights, where a file names some."""
    if path := terms.get("model.path"):
        yield "model", Setting("pretrained", path.words)
        yield "model.path", Setting(str(path.value), path.words)


def mode(terms: Terms, case: Case) -> Made:
    """What is learned from the data. Raises ConfigError for a way to train that is not here."""
    stage = terms.get("mode.stage")
    if stage is not None and not is_off(stage.value) and stage.value not in MODES:
        remedy = "llmtrain pretrains, fine-tunes on answers, and distils"
        raise ConfigError(stage.key, stage.value, "has no counterpart", remedy)
    if "model.path" in terms:
        source = "a dataset of texts" if learns_texts(terms) else "a dataset of rows"
        yield "mode", Setting(mode_of(terms), source if stage is None else stage.words)


def mode_of(terms: Terms) -> str:
    return "pretrain" if learns_texts(terms) else "sft"


def learns_texts(terms: Terms) -> bool:
    """Whether texts are learned whole, and not the answers of rows."""
    stage = terms.get("mode.stage")
    return "data.texts" in terms or (stage is not None and stage.value == "pt")


def adapter(terms: Terms, case: Case) -> Made:
    """Which adapter, if any, for a file that names a model."""
    if "model.path" not in terms:
        return
    given = terms.get("adapter.kind", Given("adapter", "full", True))
    kind = "full" if is_off(given.value) else str(given.value)
    if kind not in ADAPTERS:
        remedy = "take lora, qlora or the training of all parameters"
        raise ConfigError(given.key, given.value, "has no counterpart", remedy)
    ours = ADAPTERS[kind]
    if ours == "lora":
        ours = yield from variant(terms)
    yield "adapter", Setting(ours, sources([given, *switched_on(terms, SWITCHES)]))
    yield from lora(terms)


def variant(terms: Terms) -> Any:
    """LoRA, DoRA, or QLoRA where the weights are kept in 4 bits."""
    ours = "lora"
    for given in switched_on(terms, SWITCHES[:3]):
        if given.key == "load_in_4bit" or given.value == 4:
            ours = "qlora"
        else:
            why = "the frozen weights stay in 16 bits; adapter=qlora keeps them in 4"
            yield Left(given.key, given.value, why, True)
    for dora in switched_on(terms, SWITCHES[3:]):
        if ours == "lora":
            return "dora"
        yield Left(dora.key, dora.value, "4-bit weights have plain LoRA", True)
    return ours


def lora(terms: Terms) -> Made:
    """Rank, scale and layers."""
    rank, target = terms.get("adapter.rank"), terms.get("adapter.target")
    if rank is not None:
        yield "adapter.rank", Setting(int(rank.value), rank.words, "", rank.is_default)
        yield (
            "adapter.alpha",
            Setting(2.0 * int(rank.value), "twice the rank, its default", "", True),
        )
    for everywhere in switched_on(terms, ["adapter.is_everywhere"]):
        yield "adapter.target_modules", Setting("auto", everywhere.words)
    if target is not None and not is_off(target.value):
        names = [str(name) for name in target.value]
        ours = "auto" if EVERYWHERE & set(names) else names
        yield "adapter.target_modules", Setting(ours, target.words, "", target.is_default)
