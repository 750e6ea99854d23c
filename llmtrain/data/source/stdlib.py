"""The source code of the running interpreter's own standard library: real text, no download."""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.data.corpus import Document, TextCorpus, digest
from llmtrain.errors import ConfigError

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLE_MARKS = (b"decoding_table", b"decoding_map")


@dataclass
class Stdlib(TextCorpus):
    """One document per module, named by its relative path; tests and character tables left out."""

    kind: str = "stdlib"

    def check(self) -> None:
        super().check()
        if self.path is not None:
            raise ConfigError(
                "data.path",
                self.path,
                "has no effect with data=stdlib",
                f"say data=text data.path={self.path}",
            )
        if next(modules(), None) is None:
            raise ConfigError(
                "data", "stdlib", f"finds no source in {root()}", "say data=text data.path=<folder>"
            )

    def documents(self) -> Iterator[Document]:
        for name, source in sources():
            yield Document(name, source.decode("utf-8", "replace"))

    def fingerprint(self) -> str:
        return digest(part for source in sources() for part in source)

    def num_bytes(self) -> int:
        return sum(os.path.getsize(path) for path in modules())


def root() -> str:
    return sysconfig.get_path("stdlib")


def sources() -> Iterator[tuple[str, bytes]]:
    """Relative path and content of every module that is text and not a table."""
    folder = root()
    for path in sorted(modules()):  # strings: Path objects would cost more than the hashing
        with open(path, "rb") as file:
            source = file.read()
        name = path[len(folder) + 1 :].replace(os.sep, "/")
        if not is_character_table(name, source):
            yield name, source


def modules() -> Iterator[str]:
    for folder, subfolders, files in os.walk(root()):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        yield from (os.path.join(folder, name) for name in files if name.endswith(".py"))


def is_character_table(name: str, source: bytes) -> bool:
    return name.startswith("encodings/") and any(mark in source for mark in TABLE_MARKS)
