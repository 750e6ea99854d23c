"""What a finished model loses on text: nats of each sequence, document or answer."""

# B batch, L length, V vocabulary

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.data.corpus import Corpus, Document
from llmtrain.data.encoding import encode_marked
from llmtrain.data.example import Example
from llmtrain.data.examples import ExampleCorpus
from llmtrain.data.sequences import NO_LABEL, Sequences, open_sequences
from llmtrain.data.shards import Manifest
from llmtrain.data.split import hold_out
from llmtrain.errors import ConfigError
from llmtrain.finished import Finished
from llmtrain.writing import template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int64]
Batch = dict[str, Ids]


class Loss(NamedTuple):
    """Nats, summed over the tokens that were predicted."""

    nats: float
    num_tokens: int


@dataclass(frozen=True)
class Passage:
    """A document as tokens; ``is_learned`` marks those whose prediction counts."""

    ids: Ids
    is_learned: npt.NDArray[np.bool_]


def held_out(corpus: Corpus, items: Iterable[Any]) -> Iterator[Any]:
    """Those documents or examples that training never saw, by the rule that training used."""
    holds_out = hold_out(corpus) if corpus.held_out_fraction else None
    for split, item in items:
        if split == "held_out" or (split is None and holds_out is not None and holds_out(item.id)):
            yield item


def examples_of(corpus: ExampleCorpus, only_held_out: bool = True) -> list[Example]:
    """The rows of a corpus, those held out or all."""
    rows = corpus.rows(on_bad_of(corpus))
    chosen = held_out(corpus, rows) if only_held_out else (example for _, example in rows)
    return list(chosen)


def documents_of(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", only_held_out: bool
) -> list[Document]:
    """The documents of a corpus, those held out or all; rows in the template of the tokenizer."""
    if isinstance(corpus, ExampleCorpus):
        template = template_of(tokenizer)
        return [
            Document(example.id, *template.rendered(example, corpus.loss_on))
            for example in examples_of(corpus, only_held_out)
        ]
    documents = texts_of(corpus)
    pairs = ((document.split, document) for document in documents)
    return list(held_out(corpus, pairs)) if only_held_out else [document for _, document in pairs]


def texts_of(corpus: Any) -> Iterator[Document]:
    """The documents of a source of text; of a stream, those of the few files that stand for it."""
    if not corpus.is_fetched:
        yield from corpus.documents()
        return
    for slice in corpus.samples():
        found = corpus.read_slice(slice, Path(), corpus.raise_unless_skipped)
        yield from (document for document in found if not document.lack)


def on_bad_of(corpus: Corpus) -> Callable[[ConfigError], None]:
    """Raise over a row that is wrong, unless the corpus says to leave it out."""

    def raise_or_skip(error: ConfigError) -> None:
        if not corpus.skips_bad:
            raise error

    return raise_or_skip


def spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    """At most ``limit`` items, from all over the sequence."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def sequences_of(manifest: Manifest, seq_len: int, keep_apart: bool) -> Sequences:
    """The held-out split; documents that are learned in part have a sequence of their own."""
    return open_sequences(
        manifest, "held_out", seq_len, keep_apart=keep_apart, packing=False, cover_all=True
    )


def sequence_losses(
    finished: Finished, sequences: Sequences, indices: Sequence[int], batch_size: int
) -> list[Loss]:
    """The loss of some sequences of a split, each by itself."""
    parts = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    batches = (sequences.batch(part) for part in parts)
    return batch_losses(finished, batches, len(parts))


def passage(tokenizer: "PreTrainedTokenizerBase", document: Document) -> Passage:
    """A document as the model reads it; a text is begun as the tokenizer begins one.

    Where it begins none, with the end-of-text token, so that a text's first token is predicted.
    """
    if document.learned is not None:
        ((ids, mask),) = encode_marked(tokenizer.backend_tokenizer, [document])
        return Passage(np.array(ids, dtype=np.int64), mask.astype(bool))
    ids = list(tokenizer(document.text, verbose=False)["input_ids"])
    if ids[:1] != [tokenizer.bos_token_id] and tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id, *ids]
    is_learned = np.arange(len(ids)) > 0
    return Passage(np.array(ids, dtype=np.int64), is_learned)


def passage_losses(
    finished: Finished, passages: Sequence[Passage], seq_len: int, batch_size: int
) -> list[Loss]:
    """The loss of each passage; one of more than L + 1 tokens is read in windows of L."""
    windows = [
        (number, passage, start)
        for number, passage in enumerate(passages)
        for start in range(0, max(1, len(passage.ids) - 1), seq_len)
    ]
    windows.sort(key=lambda window: len(window[1].ids) - window[2])  # little padding
    parts = [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]
    batches = (padded([(item, start) for _, item, start in part], seq_len) for part in parts)
    nats, num_tokens = np.zeros(len(passages)), np.zeros(len(passages), dtype=np.int64)
    losses = batch_losses(finished, batches, len(parts))
    for (number, *_), loss in zip(windows, losses, strict=True):
        nats[number] += loss.nats
        num_tokens[number] += loss.num_tokens
    return [Loss(float(a), int(b)) for a, b in zip(nats, num_tokens, strict=True)]


def padded(windows: Sequence[tuple[Passage, int]], seq_len: int) -> Batch:
    """Windows as one batch, filled up on the right, where no token before can see it."""
    width = min(seq_len, max(1, *(len(item.ids) - 1 - start for item, start in windows)))
    input_ids_BL = np.zeros((len(windows), width), dtype=np.int64)
    labels_BL = np.full_like(input_ids_BL, NO_LABEL)
    for row, (item, start) in enumerate(windows):
        inputs = item.ids[start : start + width]
        labels = item.ids[start + 1 : start + width + 1]
        kept = item.is_learned[start + 1 : start + width + 1]
        input_ids_BL[row, : len(inputs)] = inputs
        labels_BL[row, : len(labels)] = np.where(kept, labels, NO_LABEL)
    return {"input_ids": input_ids_BL, "labels": labels_BL}


def batch_losses(finished: Finished, batches: Iterable[Batch], num_batches: int) -> list[Loss]:
    """The loss of each row of some batches."""
    return [loss for batch in shown(batches, num_batches) for loss in row_losses(finished, batch)]


def shown(items: Iterable[Any], total: int) -> Iterable[Any]:
    """The items, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        items, "evaluating", total, console=console, transient=True, disable=not console.is_terminal
    )


def row_losses(finished: Finished, batch: Batch) -> list[Loss]:
    """The loss of each row of a batch."""
    import torch

    from llmtrain.kernel.cross_entropy import cross_entropy_sum
    from llmtrain.kernel.packed import tell_documents

    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    tensors = {name: tensor.to(finished.model.device) for name, tensor in tensors.items()}
    labels_BL = tensors.pop("labels")
    tell_documents(finished.model, tensors.get("position_ids"))
    with torch.inference_mode():
        logits_BLV = finished.model(**tensors, use_cache=False).logits
        nats = [float(cross_entropy_sum(*row)) for row in zip(logits_BLV, labels_BL, strict=True)]
    tell_documents(finished.model, None)  # it may write with a cache next
    counts = (labels_BL >= 0).sum(1).tolist()
    return [Loss(*pair) for pair in zip(nats, counts, strict=True)]
