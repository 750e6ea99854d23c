"""Data whose documents are rows that teach an answer: what all kinds of them share."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmtrain.data.corpus import MANDATORY, Corpus, Document, OnBad, OnBadRow
from llmtrain.data.example import Evidence, Example, LossOn, Message
from llmtrain.data.template import check_template, named, open_template
from llmtrain.errors import ConfigError
from llmtrain.schema import Recipe, learned, unlearned, unlearned_part

__all__ = ["Evidence", "Example", "ExampleCorpus", "LossOn", "Message", "OnBad", "OnBadRow"]


@dataclass
class ExampleRecipe(Recipe):
    """What is sensible to train with on these rows; ``adapter_lr`` where an adapter is trained."""

    adapter_lr: float = unlearned("???", above=0)


@dataclass
class ExampleCorpus(Corpus):
    """Rows of a prompt and an answer, of which the answer is learned.

    ``template`` names a chat template in place of the tokenizer's own. ``validation_fraction`` of
    the rows are held out, by a hash of their content, or ``validation_path`` has them.
    ``packing`` puts several rows into a sequence, kept apart; else each has one of its own.
    """

    template: str | None = None
    loss_on: LossOn = LossOn.assistant
    on_bad_row: OnBadRow = OnBadRow.fail
    packing: bool = True
    validation_fraction: float = learned(MANDATORY, above=0, high=0.9)
    validation_path: str | None = unlearned()
    recipe: ExampleRecipe = unlearned_part(ExampleRecipe)

    has_masks: ClassVar[bool] = True

    @abstractmethod
    def examples(self, on_bad: OnBad) -> Iterator[Example]:
        """Every row of ``path`` in its order; a row that is wrong goes to ``on_bad`` instead."""

    def validation_examples(self, on_bad: OnBad) -> Iterator[Example]:
        """Every row of ``validation_path``; nothing where that is not set."""
        return iter(())

    @property
    def held_out_fraction(self) -> float:
        return 0.0 if self.validation_path else self.validation_fraction

    def holds_out(self, hashed: int) -> bool:
        return hashed < self.validation_fraction * 2**64

    def ids(self) -> Iterator[str]:
        if self.validation_path is None:
            yield from (example.id for example in self.examples(self.raise_unless_skipped))

    def check(self) -> None:
        super().check()
        check_template(self.template)

    @property
    def packs(self) -> bool:
        return self.packing

    @property
    def keeps_apart(self) -> bool:
        return self.packing

    @property
    def skips_bad(self) -> bool:
        return self.on_bad_row is OnBadRow.skip

    def rendering(self) -> list[str]:
        template = "" if self.template is None else named(self.template)
        return [template, self.loss_on.value, self.on_bad_row.value]

    def chat_template(self, tokenizer: Path) -> str:
        return open_template(tokenizer, self.template).source

    def written(self, tokenizer: Path, on_bad: OnBad) -> Iterator[Document]:
        """Every row as text, by the tokenizer's template or the named one."""
        template = open_template(tokenizer, self.template)
        for split, example in self.rows(on_bad):
            try:
                text, spans = template.rendered(example, self.loss_on)
            except ConfigError as error:
                on_bad(error)
            else:
                yield Document(example.id, text, spans, split, bool(example.messages))

    def rows(self, on_bad: OnBad) -> Iterator[tuple[str | None, Example]]:
        """Every row with the split that its file decides; None: its hash does."""
        given = self.validation_path is not None
        yield from (("train" if given else None, example) for example in self.examples(on_bad))
        yield from (("held_out", example) for example in self.validation_examples(on_bad))
