"""Several sources of text in proportion: each is one of the group ``data``."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from llmtrain.data.corpus import PERIOD, Deduplicate, Document, OnBad, Slice, TextCorpus, digest
from llmtrain.errors import ConfigError, nearest
from llmtrain.schema import learned, part_of_values


class WhenDry(Enum):
    """What follows when a source has been read: it is read again, or the run ends."""

    repeat = "repeat"
    stop = "stop"


@dataclass
class Mixture(TextCorpus):
    """``weights`` are by tokens, for each of ``sources``; without them their sizes count.

    Shares go as weights to the power of ``1 / temperature``: above 1 small sources come up more
    often. All share the tokenizer and the rule of holding out.
    """

    kind: str = "mixture"
    sources: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    temperature: float = learned(1.0, above=0)
    when_dry: WhenDry = WhenDry.repeat

    def __post_init__(self) -> None:
        self.sources = dict(sorted(self.sources.items()))
        for name, values in self.sources.items():
            if isinstance(values, dict) and "kind" in values:  # as a run's config.yaml has it
                self.sources[name] = part_of_values("data", values, f"data.sources.{name}")

    @property
    def corpora(self) -> dict[str, TextCorpus]:
        """The sources by their names, with what all share."""
        shared = {"held_out_every": self.held_out_every, "tokenizer": self.tokenizer}
        return {name: replace(source, **shared) for name, source in self.sources.items()}

    def check(self) -> None:
        super().check()
        if not self.sources:
            remedy = "give some: +data@data.sources.web=text data.sources.web.path=my_texts"
            raise ConfigError("data.sources", "{}", "holds no source", remedy)
        if self.path is not None:
            remedy = "give each source its own: data.sources.<name>.path"
            raise ConfigError("data.path", self.path, "has no effect with data=mixture", remedy)
        self.check_weights()
        for name, source in self.sources.items():
            check_source(f"data.sources.{name}", source)
        for name, corpus in self.corpora.items():
            with named(name):
                corpus.check()

    def check_weights(self) -> None:
        """Raise ConfigError for a weight of no source, a source without one, and one of none."""
        for name in self.weights.keys() - self.sources.keys():
            reason = "is the weight of no source"
            raise ConfigError("data.weights", name, reason, nearest(name, self.sources))
        for name in self.sources.keys() - self.weights.keys() if self.weights else ():
            raise ConfigError(f"data.weights.{name}", None, "is not set", "give all or none")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                reason, remedy = "is no number above 0", "give one, or leave that source out"
                raise ConfigError(f"data.weights.{name}", weight, reason, remedy)
        if self.weights:
            self.shares({})  # which the sizes have no part in

    def shares(self, tokens: dict[str, int]) -> dict[str, float]:
        """The part of all tokens that each source has, given how many it holds.

        ConfigError for a part too small to be kept to.
        """
        given = self.weights or tokens
        logs = {name: math.log(max(given[name], 1e-300)) for name in self.sources}
        most = max(logs.values())  # so that no power is too large
        raised = {name: math.exp((log - most) / self.temperature) for name, log in logs.items()}
        shares = {name: weight / sum(raised.values()) for name, weight in raised.items()}
        for name, share in shares.items():
            if share * PERIOD < 1:
                reason = f"is below one part in {PERIOD:,}"
                raise ConfigError(
                    f"data.weights.{name}", share, reason, "raise it, or leave it out"
                )
        return shares

    def slices(self) -> Iterator[Slice]:
        for name, corpus in self.corpora.items():
            with named(name):
                for slice in corpus.slices():
                    yield replace(slice, source=name)

    def samples(self) -> list[Slice]:
        found = []
        for name, corpus in self.corpora.items():
            with named(name):
                found += [replace(slice, source=name) for slice in corpus.samples()]
        return found

    @property
    def is_fetched(self) -> bool:
        return any(source.is_fetched for source in self.sources.values())

    def read_slice(self, slice: Slice, tokenizer: Path, on_bad: OnBad) -> Iterator[Document]:
        corpus = self.corpora[slice.source]
        chosen = on_bad if corpus.skips_bad else corpus.raise_unless_skipped
        with named(slice.source):
            yield from corpus.read_slice(slice, tokenizer, chosen)

    def documents(self) -> Iterator[Document]:
        for name, corpus in self.corpora.items():
            with named(name):
                yield from corpus.documents()

    @property
    def ends_when_dry(self) -> bool:
        return self.when_dry is WhenDry.stop

    @property
    def skips_bad(self) -> bool:
        return any(source.skips_bad for source in self.sources.values())

    @property
    def filters(self) -> bool:
        return any(source.filters for source in self.sources.values())

    def writing(self) -> list[str]:
        shares = [f"{name}={weight!r}" for name, weight in sorted(self.weights.items())]
        return [*super().writing(), *shares, repr(self.temperature), self.when_dry.value]

    def fingerprint(self) -> str:
        corpora = self.corpora.items()
        return digest(part for name, corpus in corpora for part in (name, corpus.fingerprint()))

    def num_bytes(self) -> int:
        return sum(corpus.num_bytes() for corpus in self.corpora.values())


def check_source(key: str, source: Any) -> None:
    """Raise ConfigError for what cannot be mixed, and for settings that only the mixture has."""
    if not isinstance(source, TextCorpus) or isinstance(source, Mixture):
        reason, remedy = (
            "is no source of plain text",
            f"say +data@{key}=text, or another of its like",
        )
        raise ConfigError(key, getattr(source, "kind", source), reason, remedy)
    if source.deduplicate is not Deduplicate.none:
        remedy = "set data.deduplicate for all"
        raise ConfigError(f"{key}.deduplicate", source.deduplicate.value, "has no effect", remedy)
    if source.keep_documents_apart:
        remedy = "set data.keep_documents_apart for all"
        raise ConfigError(f"{key}.keep_documents_apart", "true", "has no effect", remedy)


@contextmanager
def named(source: str) -> Iterator[None]:
    """Errors about a source's keys, under the names that they have in a mixture."""
    try:
        yield
    except ConfigError as error:
        _, (key, *rest) = error.__reduce__()
        key = key.replace("data.", f"data.sources.{source}.", 1)
        raise ConfigError(key, *rest) from None
