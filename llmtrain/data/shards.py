"""Documents tokenised once into memory-mapped shards, and the manifest that describes them."""

import hashlib
import json
import lzma
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.data import tokenising
from llmtrain.data.cache import make_once
from llmtrain.data.corpus import BYTES_PER_TOKEN, Corpus, Deduplicate, Slice, digest
from llmtrain.data.duplicates import repeated
from llmtrain.data.split import hold_out
from llmtrain.data.tokenising import MOST_REASONS, Advance, Shard, Tokenised, Tokenising
from llmtrain.data.tokenizer import Vocabulary, make_vocabulary, origin_of
from llmtrain.data.workers import mark_all, tokenise_all
from llmtrain.errors import ConfigError

SHARDS = "shards"  # in the cache: what several corpora may have in common
FORMAT = 5  # raise it when the files change, so that older caches are not taken for new ones
MOST_XZ_BYTES = 32 * 2**20  # xz needs a second for each MiB
VERIFIED_BYTES = 2**28  # of tokens, whose hashes are compared at each start: a quarter of a second


@dataclass(frozen=True)
class Split:
    """One side of the corpus: its shards in order, what is in all of them, and a hash of that.

    ``num_learned_tokens`` have a loss when everything is read once; ``num_bytes`` are theirs.
    """

    num_documents: int
    num_tokens: int
    num_learned_tokens: int
    num_bytes: int
    shards: tuple[Shard, ...]
    sha: str

    @classmethod
    def of(cls, shards: Iterable[Shard], has_masks: bool) -> "Split":
        """Of a stream every token is learned but the very first."""
        shards = tuple(shards)
        num_first = 0 if has_masks or not shards else 1
        return cls(
            num_documents=sum(shard.num_documents for shard in shards),
            num_tokens=sum(shard.num_tokens for shard in shards),
            num_learned_tokens=sum(shard.num_learned_tokens for shard in shards) - num_first,
            num_bytes=sum(shard.num_bytes for shard in shards),
            shards=shards,
            sha=hashlib.sha256("".join(shard.sha for shard in shards).encode()).hexdigest(),
        )


@dataclass(frozen=True)
class Source:
    """One of a mixture: its training tokens stand together, in the order of the sources.

    ``share`` is that of all tokens that are trained on.
    """

    name: str
    num_tokens: int
    share: float


@dataclass(frozen=True)
class Manifest:
    """What was prepared, and where.

    ``fingerprint`` covers sources, tokenizer and split rule, by which the folder is found. Each
    split's ``sha`` covers the tokens themselves, whatever path they were read from. ``skipped``
    are the reasons of rows that were left out, the first few of ``num_skipped``; ``lacks`` counts
    documents by what the filter missed; ``num_repeated`` said what an earlier one says.
    ``sources`` are those of a mixture, which ends at the first that has been read if
    ``ends_when_dry``.
    """

    folder: Path
    fingerprint: str
    dtype: str
    vocabulary: Vocabulary
    splits: dict[str, Split]
    held_out_xz_bits_per_byte: float | None
    has_masks: bool = False
    chat_template: str | None = None
    num_skipped: int = 0
    skipped: tuple[str, ...] = ()
    num_repeated: int = 0
    lacks: dict[str, int] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    ends_when_dry: bool = False

    @property
    def train(self) -> Split:
        return self.splits["train"]

    @property
    def held_out(self) -> Split:
        return self.splits["held_out"]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read ``manifest.json`` of a folder that :func:`prepare` made."""
        saved = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = folder.parent.parent / "tokenizers" / saved["vocabulary"].pop("folder")
        vocabulary = Vocabulary(folder=tokenizer, **saved.pop("vocabulary"))
        splits = {name: to_split(split) for name, split in saved.pop("splits").items()}
        saved["skipped"] = tuple(saved["skipped"])
        saved["sources"] = tuple(Source(**source) for source in saved["sources"])
        return cls(folder=folder, vocabulary=vocabulary, splits=splits, **saved)

    def save(self) -> None:
        saved = asdict(self)
        del saved["folder"]  # both folders are found from where the file lies: a cache may move
        saved["vocabulary"]["folder"] = self.vocabulary.folder.name
        text = json.dumps(saved, indent=2) + "\n"
        (self.folder / "manifest.json").write_text(text, encoding="utf-8")


def to_split(saved: dict[str, Any]) -> Split:
    return Split(**saved | {"shards": tuple(Shard(**shard) for shard in saved["shards"])})


def prepare(
    corpus: Corpus, cache_root: Path, tokenizer_path: str | None = None, progress: bool = True
) -> Manifest:
    """Tokenise a corpus unless that was done before, and return its manifest.

    ``tokenizer_path`` (a pretrained model's) goes before ``corpus.tokenizer.path``. A bar is shown
    on stderr if ``progress`` and it is a terminal. ConfigError for data that cannot be read and
    for a split without documents. Processes that prepare the same corpus at once do it once; one
    that is killed loses the slices that it was at. Up to ``VERIFIED_BYTES`` the hashes of all
    shards are compared.
    """
    corpus.check()
    cache_root = cache_root.expanduser().absolute()
    sources = corpus.fingerprint()
    origin = origin_of(corpus, sources, tokenizer_path)
    fingerprint = combine(corpus, sources, origin.key)

    def make(folder: Path) -> None:
        job = tokenising_of(corpus, make_vocabulary(origin, cache_root), cache_root)
        with bar(corpus, progress) as advance:
            slices = chosen_slices(job)
            check_space(job, slices, cache_root)
            found = tokenise_all(job, slices, corpus.num_workers, advance)
        assemble(job, slices, found, fingerprint, folder).save()

    manifest = Manifest.load(make_once(folder_of(cache_root, fingerprint), is_whole, make))
    if num_token_bytes(manifest) <= VERIFIED_BYTES:
        verify(manifest)
    return manifest


def num_token_bytes(manifest: Manifest) -> int:
    width = np.dtype(manifest.dtype).itemsize
    return sum(split.num_tokens * width for split in manifest.splits.values())


def verify(manifest: Manifest) -> None:
    """Raise ConfigError for the first shard that does not hold what was written into it."""
    for split in manifest.splits.values():
        for shard in split.shards:
            if tokenising.sha_of(manifest.folder, shard, manifest.dtype) != shard.sha:
                damaged = (manifest.folder / shard.path).resolve().parent
                raise ConfigError(
                    "cache_root",
                    damaged,
                    "does not hold the tokens that were written there: their hash is another",
                    "remove that folder and give the same command again, which makes it again",
                )


def prepare_share(
    corpus: Corpus, cache_root: Path, number: int, count: int, tokenizer_path: str | None = None
) -> int:
    """Tokenise every ``count``-th slice from ``number`` (0 the first) on; how many these are.

    When all shares are done, :func:`prepare` finds their shards and only writes the manifest.
    """
    corpus.check()
    cache_root = cache_root.expanduser().absolute()
    origin = origin_of(corpus, corpus.fingerprint(), tokenizer_path)
    job = tokenising_of(corpus, make_vocabulary(origin, cache_root), cache_root)
    slices = chosen_slices(job, number, count)[number::count]
    check_space(job, slices, cache_root)
    with bar(corpus, progress=True) as advance:
        return len(tokenise_all(job, slices, corpus.num_workers, advance))


def chosen_slices(job: Tokenising, number: int = 0, count: int = 1) -> list[Slice]:
    """The slices of a corpus, with what is left out of each because it was said before.

    Of several machines each marks every ``count``-th slice first, from ``number`` on.
    """
    slices = list(job.corpus.slices())
    if job.corpus.duplicates is Deduplicate.none:
        return slices
    if count > 1:
        mark_all(job, slices[number::count], job.corpus.num_workers)
    folders = mark_all(job, slices, job.corpus.num_workers)
    found = repeated([folder / "marks.npy" for folder in folders])
    return [
        replace(slice, left_out=frozenset(numbers.tolist()))
        for slice, numbers in zip(slices, found, strict=True)
    ]


def tokenising_of(corpus: Corpus, vocabulary: Vocabulary, cache_root: Path) -> Tokenising:
    holds_out = hold_out(corpus) if corpus.held_out_fraction else None
    # twice the mean, so that the text is there wherever its compression is wanted
    keeps_text = corpus.num_bytes() * corpus.held_out_fraction <= 2 * MOST_XZ_BYTES
    return Tokenising(corpus, vocabulary, holds_out, keeps_text, cache_root / SHARDS)


def find_manifest(
    corpus: Corpus, cache_root: Path, tokenizer_path: str | None = None
) -> Manifest | None:
    """The manifest of a corpus that was prepared before; None if it was not. Reads no tokens."""
    sources = corpus.fingerprint()
    fingerprint = combine(corpus, sources, origin_of(corpus, sources, tokenizer_path).key)
    folder = folder_of(cache_root.expanduser().absolute(), fingerprint)
    return Manifest.load(folder) if is_whole(folder) else None


def combine(corpus: Corpus, sources: str, tokenizer_key: str) -> str:
    parts = [FORMAT, sources, tokenizer_key, corpus.held_out_fraction]
    return digest([*parts, *corpus.writing()])


def folder_of(cache_root: Path, fingerprint: str) -> Path:
    return cache_root / "tokens" / fingerprint


def is_whole(folder: Path) -> bool:
    """Whether the manifest and every file that it names are there, of the right size."""
    if not (folder / "manifest.json").is_file():
        return False
    manifest = Manifest.load(folder)
    has_tokenizer = (manifest.vocabulary.folder / "tokenizer.json").is_file()
    shards = (shard for split in manifest.splits.values() for shard in split.shards)
    return has_tokenizer and all(tokenising.has_size(folder, shard) for shard in shards)


def check_space(job: Tokenising, slices: list[Slice], cache_root: Path) -> None:
    """Raise ConfigError where there is no room for the slices that are to be tokenised yet."""
    missing = (each for each in slices if not job.has_all(job.folder_of(each)))
    num_bytes = sum(each.num_bytes for each in missing)
    free_gib = shutil.disk_usage(cache_root).free / 2**30
    needed_gib = num_bytes / BYTES_PER_TOKEN * np.dtype(job.dtype).itemsize / 2**30
    if needed_gib > free_gib:
        raise ConfigError(
            "cache_root",
            cache_root,
            f"has {free_gib:.1f} GiB free and the tokens take up to {needed_gib:.1f} GiB",
            "free some or set cache_root to a larger disk",
        )


def assemble(
    job: Tokenising,
    slices: list[Slice],
    found: list[Path],
    fingerprint: str,
    folder: Path,
) -> Manifest:
    """The manifest of shards that lie elsewhere in the cache, in the order of their slices."""
    made = [Tokenised.load(path) for path in found]
    splits = {
        name: Split.of(shards_of(name, made, found), job.corpus.has_masks)
        for name in tokenising.SPLITS
    }
    check_splits(job.corpus, splits)
    has_dialogues = any(each.has_dialogues for each in made)
    template = job.corpus.chat_template(job.vocabulary.folder) if has_dialogues else None
    return Manifest(
        folder=folder,
        fingerprint=fingerprint,
        dtype=job.dtype,
        vocabulary=job.vocabulary,
        splits=splits,
        held_out_xz_bits_per_byte=xz_bits_per_byte(found) if job.keeps_text else None,
        has_masks=job.corpus.has_masks,
        chat_template=template,
        num_skipped=sum(each.num_skipped for each in made),
        skipped=tuple(reason for each in made for reason in each.skipped)[:MOST_REASONS],
        num_repeated=sum(len(slice.left_out) for slice in slices),
        lacks=dict(sum((Counter(each.lacks) for each in made), Counter())),
        sources=tuple(sources_of(job.corpus, slices, made)),
        ends_when_dry=job.corpus.ends_when_dry,
    )


def shards_of(split: str, made: list[Tokenised], found: list[Path]) -> Iterator[Shard]:
    """The shards of a split, by their paths from a manifest's folder."""
    for path, each in zip(found, made, strict=True):
        if split in each.shards:
            shard = each.shards[split]
            yield replace(shard, path=f"../../{SHARDS}/{path.name}/{shard.path}")


def sources_of(corpus: Corpus, slices: list[Slice], made: list[Tokenised]) -> Iterator[Source]:
    """The sources of a mixture, with their training tokens and their shares."""
    tokens: Counter[str] = Counter()
    for slice, each in zip(slices, made, strict=True):
        tokens[slice.source] += each.shards["train"].num_tokens if "train" in each.shards else 0
    check_sources(tokens)
    for name, share in corpus.shares(tokens).items():
        yield Source(name, tokens[name], share)


def check_sources(tokens: Counter[str]) -> None:
    """Raise ConfigError for a source of a mixture that has nothing to train on."""
    for name in (name for name, count in tokens.items() if name and not count):
        key, remedy = f"data.sources.{name}", "ask less of it, or leave it out"
        raise ConfigError(key, name, "holds no document to train on", remedy)


def xz_bits_per_byte(slices: list[Path]) -> float | None:
    """What ``xz -9`` makes of the held-out text; None if that is too long, or if there is none."""
    files = [path / tokenising.TEXT for path in slices if (path / tokenising.TEXT).is_file()]
    num_bytes = sum(file.stat().st_size for file in files)
    if not 0 < num_bytes <= MOST_XZ_BYTES:
        return None
    text = b"".join(file.read_bytes() for file in files)
    return 8 * len(lzma.compress(text, preset=9)) / num_bytes


def check_splits(corpus: Corpus, splits: dict[str, Split]) -> None:
    for name, split in splits.items():
        if split.num_documents == 0:
            remedy = f"add some, or change the share held out ({corpus.held_out_fraction:g})"
            raise ConfigError(
                "data.path", corpus.path, f"leaves no document in the {name} split", remedy
            )


@contextmanager
def bar(corpus: Corpus, progress: bool) -> Iterator[Advance]:
    """A function that moves a progress bar on by some bytes of text."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    hidden = not (progress and console.is_terminal)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden
    ) as shown:
        task = shown.add_task(f"tokenising {corpus.name}", total=corpus.num_bytes())
        yield lambda num_bytes: shown.advance(task, num_bytes)
