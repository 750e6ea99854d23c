"""Tokenise before any GPU is taken: `python -m llmtrain.data prepare data=text data.path=texts`.

    python -m llmtrain.data prepare model=llama_1b data=text data.path=texts data.num_workers=16
    python -m llmtrain.data prepare --share 3/16 ...     one of 16 machines, or jobs of an array

The words are those of the run that will train on it. What was tokenised is kept: a command that was
killed goes on where it was. After all shares, the command without --share puts them together.
"""

import argparse
import re
import sys
from typing import TYPE_CHECKING

from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.config import RunConfig
    from llmtrain.data.shards import Manifest


def add_options(options: argparse.ArgumentParser) -> None:
    """Give a parser the command's words."""
    options.description, options.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    options.add_argument("--share", metavar="N/M", help="from 1/M to M/M")
    options.add_argument("--verify", action="store_true", help="compare the hashes of all shards")
    options.add_argument("overrides", nargs="*", help="key=value, as of llmtrain.run")
    options.set_defaults(do=prepare)


def prepare(arguments: argparse.Namespace) -> None:
    """Tokenise what the words say, or a share of it."""
    from llmtrain.compose import composed
    from llmtrain.schema import check_bounds

    config = composed(arguments.overrides)
    check_bounds(config)
    warn_of_tokenizer(config)
    if arguments.share:
        prepare_one(config, arguments.share)
    else:
        prepare_all(config, arguments.verify)


def warn_of_tokenizer(config: "RunConfig") -> None:
    """Say now what a run with these words would be refused for; text is read for any model."""
    from llmtrain.checks import check_given_tokenizer

    try:
        check_given_tokenizer(config)
    except ConfigError as error:
        if error.key != "model.config.vocab_size":
            raise
        print(f"warning: {error}", file=sys.stderr)


def prepare_one(config: "RunConfig", share: str) -> None:
    from llmtrain.data.shards import prepare_share

    number, count = share_of(share)
    where = (config.cache, number - 1, count, config.tokenizer_path)
    print(f"Share {share}: {prepare_share(config.data, *where):,} slices are done.")


def share_of(words: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", words)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError("--share", words, "is no share", "give one from 1/16 to 16/16, say")
    return number, count


def prepare_all(config: "RunConfig", verifies: bool) -> None:
    from llmtrain.data.shards import prepare, verify

    manifest = prepare(config.data, config.cache, config.tokenizer_path)
    if verifies:
        verify(manifest)
    show(manifest)
    if verifies:
        print("  every shard holds what was written into it")


def show(manifest: "Manifest") -> None:
    """What was prepared, in a few lines."""
    from llmtrain.data.overlap import overlap_of

    print(manifest.folder)
    for name, split in manifest.splits.items():
        what = f"{split.num_tokens:,} tokens, {split.num_documents:,} documents"
        print(f"  {name.replace('_', ' ')}: {what}, {len(split.shards):,} shards")
    for source in manifest.sources:
        print(f"  {source.name}: {source.num_tokens:,} tokens, {source.share:.1%} of the training")
    if manifest.num_repeated:
        print(f"  left out: {manifest.num_repeated:,} documents that say what an earlier one says")
    for lack, count in sorted(manifest.lacks.items()):
        print(f"  left out: {count:,} documents, {lack}")
    if manifest.num_skipped:
        print(f"  left out: {manifest.num_skipped:,} that could not be read, first of all")
        print("\n".join(f"    {reason}" for reason in manifest.skipped))
    print(f"  {overlap_of(manifest):.1%} of the held-out tokens stand in the training text, too")
