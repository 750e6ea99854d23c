"""Text that others published: a data set of the catalogue, where its download put it."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmtrain.data.corpus import TextCorpus
from llmtrain.data.published import PublishedCorpus
from llmtrain.data.ranges import READERS, Reader, read_jsonl
from llmtrain.data.rows import File
from llmtrain.data.source.text import Text


@dataclass
class PublishedText(PublishedCorpus, Text):
    """Those files of ``path`` that the catalogue names; a .json has a row a line."""

    kind: str = "published_text"

    readers: ClassVar[dict[str, Reader]] = READERS | {".json": read_jsonl}

    def check(self) -> None:
        if self.lack is None:
            super().check()
        else:
            TextCorpus.check(self)

    def files(self) -> list[File]:
        """The files of these data; all that are readable where ``path`` is no folder."""
        found = super().files()
        if not Path(str(self.path)).expanduser().is_dir():
            return found
        return [file for file in found if self.published.holds(file.id)]
