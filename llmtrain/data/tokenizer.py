"""Tokenizers: a byte-level BPE trained here, or one that exists, each as a cached folder."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.data.cache import make_once
from llmtrain.data.corpus import Corpus, TextCorpus, digest
from llmtrain.data.split import HoldsOut, hold_out
from llmtrain.errors import ConfigError
from llmtrain.hub import go_offline_if_unreachable

if TYPE_CHECKING:  # a cached vocabulary is named without loading the library
    from tokenizers import Tokenizer

FORMAT = 2  # raise it when training changes, so that older caches are not taken for new ones
END_OF_DOCUMENT = "<|endoftext|>"
MOST_TRAINING_BYTES = 256 * 2**20  # merges hardly change beyond; memory and minutes do
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens*",
    "added_*",
    "*.model",
    "chat_template*",
)


@dataclass(frozen=True)
class Vocabulary:
    """A folder that transformers' AutoTokenizer opens, and what a trainer needs to know of it.

    ``size`` is the largest id plus one: the rows that an embedding must have at least.
    """

    folder: Path
    size: int
    eos_id: int
    sha: str


@dataclass(frozen=True)
class Origin:
    """How a tokenizer comes to be, and the name that this gives it in the cache."""

    key: str
    make: Callable[[Path], None]


def origin_of(corpus: Corpus, sources: str, tokenizer_path: str | None = None) -> Origin:
    """Where the tokenizer of a corpus with the fingerprint ``sources`` comes from.

    ``tokenizer_path`` is the pretrained model's own and goes before ``data.tokenizer.path``.
    """
    if tokenizer_path is not None:
        return Origin(key_of(tokenizer_path), partial(fetch, tokenizer_path, "model.path"))
    if corpus.tokenizer.path is not None:
        path = corpus.tokenizer.path
        return Origin(key_of(path), partial(fetch, path, "data.tokenizer.path"))
    if not isinstance(corpus, TextCorpus):
        remedy = "take model=pretrained model.path=<folder>, whose own is used, or set it"
        reason = f"is needed: data={corpus.name} brings no text to train a tokenizer on"
        raise ConfigError("data.tokenizer.path", None, reason, remedy)
    trained = ["trained", FORMAT, sources, corpus.held_out_every, corpus.tokenizer.vocab_size]
    return Origin(digest(trained), partial(train, corpus))


def make_vocabulary(origin: Origin, cache_root: Path) -> Vocabulary:
    """The tokenizer's folder in the cache, made now if it is not there."""
    folder = cache_root / "tokenizers" / origin.key
    return open_vocabulary(make_once(folder, is_whole, origin.make))


def vocabulary_at(path: str, key: str, cache_root: Path) -> Vocabulary:
    """The tokenizer of a folder or hub name; ConfigError, naming ``key``, if none is there."""
    return make_vocabulary(Origin(key_of(path), partial(fetch, path, key)), cache_root)


def ids_of(vocabulary: Vocabulary) -> dict[str, int]:
    """Each token's text and id."""
    return dict(load(vocabulary.folder).get_vocab(with_added_tokens=True))


def is_whole(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def open_vocabulary(folder: Path) -> Vocabulary:
    """Size, end-of-document id and hash of a cached tokenizer; no transformers needed."""
    tokenizer = load(folder)
    eos = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    name = eos["content"] if isinstance(eos, dict) else eos
    sha = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    eos_id = tokenizer.token_to_id(name)
    assert eos_id is not None
    return Vocabulary(folder, size, eos_id, sha)


def load(folder: Path) -> "Tokenizer":
    """The tokenizer of a cached folder, set up to encode documents as plain text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a document that spells one out does not end there
    return tokenizer


def train(corpus: TextCorpus, folder: Path) -> None:
    """Train a byte-level BPE on the train split and write it as a folder for transformers."""
    vocab_size = corpus.tokenizer.vocab_size
    if vocab_size is None:
        raise ConfigError(
            "data.tokenizer.vocab_size",
            None,
            "gives no size to train to",
            "set it, or data.tokenizer.path to a tokenizer that exists",
        )
    write(train_bpe(training_texts(corpus, hold_out(corpus), folder), vocab_size), folder)


def training_texts(corpus: TextCorpus, holds_out: HoldsOut, folder: Path) -> Iterator[str]:
    """The train split; of a large corpus about 256 MiB, from the start of each slice alike."""
    slices = corpus.samples()
    share = min(1.0, MOST_TRAINING_BYTES / max(1, sum(each.num_bytes for each in slices)))
    for slice in slices:
        left = share * slice.num_bytes if share < 1 else float("inf")
        found = corpus.read_slice(slice, folder, corpus.raise_unless_skipped)
        for document in (each for each in found if not each.lack):
            if left <= 0:
                break
            left -= len(document.text)
            if not holds_out(document.id):
                yield document.text


def train_bpe(texts: Iterator[str], vocab_size: int) -> "Tokenizer":
    """A BPE over bytes, so that it encodes any text; the same texts give the same merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write(tokenizer: "Tokenizer", folder: Path) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # plain: what tokenizer.json says, no more
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "pad_token": END_OF_DOCUMENT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def fetch(path: str, key: str, folder: Path) -> None:
    """Copy a tokenizer from a folder or the hub; ConfigError, naming ``key``, if none is there."""
    tokenizer = open_with_transformers(path, key)
    remedy = "choose a tokenizer that has one, or null to train one"
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(key, path, "has no fast tokenizer (tokenizer.json)", remedy)
    if tokenizer.eos_token is None:
        raise ConfigError(key, path, "has no end-of-sequence token", remedy)
    tokenizer.save_pretrained(folder)


def open_with_transformers(path: str, key: str) -> Any:
    from transformers import AutoTokenizer

    source = Path(path).expanduser()
    if not source.is_dir():
        go_offline_if_unreachable()
    try:
        return AutoTokenizer.from_pretrained(str(source) if source.is_dir() else path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        remedy = "give a tokenizer's folder or hub name"
        raise ConfigError(key, path, f"gives no tokenizer ({reason})", remedy) from None


def key_of(path: str) -> str:
    """A name for a tokenizer that exists: its files' content, or the hub name as it stands."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return digest(["hub", path])
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}
    return digest(["folder", *(part for file in sorted(files) for part in content(file))])


def content(file: Path) -> tuple[str, bytes]:
    return file.name, file.read_bytes()
