"""Rows of your own: dialogues, instructions, prompts with completions."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.data.corpus import OnBad, digest
from llmtrain.data.example import Example
from llmtrain.data.examples import ExampleCorpus
from llmtrain.data.formats import to_example
from llmtrain.data.rows import Row, check_rows, read_rows, rows_bytes, rows_identity
from llmtrain.errors import ConfigError


@dataclass
class Chat(ExampleCorpus):
    """``path`` is a .json, .jsonl or .parquet file, a folder, a glob, or a hub name (org/name).

    The format of each row is told by its content (see ``data/formats.py``).
    """

    kind: str = "chat"

    def example(self, row: Row, key: str) -> Example:
        """What a row becomes; ConfigError, naming its place, for one that is wrong."""
        return to_example(row.values, row.place, key)

    def examples(self, on_bad: OnBad) -> Iterator[Example]:
        return self.read("data.path", on_bad)

    def validation_examples(self, on_bad: OnBad) -> Iterator[Example]:
        return self.read("data.validation_path", on_bad)

    def read(self, key: str, on_bad: OnBad) -> Iterator[Example]:
        """The examples of the rows at a key; nothing where it is not set."""
        path = self.paths().get(key)
        for row in read_rows(path, on_bad, key) if path else ():
            try:
                example = self.example(row, key)
            except ConfigError as error:
                on_bad(error)
            else:
                yield example

    def paths(self) -> dict[str, str]:
        """The paths that are set, by their keys."""
        given = {"data.path": self.path, "data.validation_path": self.validation_path}
        return {key: path for key, path in given.items() if path is not None}

    def check(self) -> None:
        super().check()
        self.check_source()

    def check_source(self) -> None:
        """Refuse in milliseconds, with a ConfigError, paths that cannot be read."""
        if self.path is None:
            remedy = "give a file, a folder, a glob or a hub name: data.path=mine.jsonl"
            raise ConfigError("data.path", None, "is not set", remedy)
        for key, path in self.paths().items():
            check_rows(path, key)

    def fingerprint(self) -> str:
        paths = self.paths().items()
        return digest(part for key, path in paths for part in [key, *rows_identity(path, key)])

    def num_bytes(self) -> int:
        return rows_bytes(self.path) if self.path else 0
