"""Text that others published: a data set of the catalogue, where its download put it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llmtrain.data.corpus import Document, OnBad, Slice, TextCorpus, digest
from llmtrain.data.published import PublishedCorpus
from llmtrain.data.ranges import READERS, Reader, ranges_of, read_jsonl
from llmtrain.data.rows import File
from llmtrain.data.source.text import SLICE_BYTES, Text
from llmtrain.data.stream import Remote, Stream
from llmtrain.errors import ConfigError

SAMPLED = 4  # files of a stream, from which a tokenizer learns


@dataclass
class PublishedText(PublishedCorpus, Text):
    """Those files of ``path`` that the catalogue names; a .json has a row a line.

    With ``stream`` they are read from the hub, each as a slice of its own, and not kept.
    """

    kind: str = "published_text"
    stream: str | None = None

    readers: ClassVar[dict[str, Reader]] = READERS | {".json": read_jsonl}

    @property
    def streamed(self) -> Stream | None:
        if self.stream is None:
            return None
        return Stream(self.published, self.path, self.stream)

    @property
    def is_fetched(self) -> bool:
        return self.stream is not None

    @property
    def lack(self) -> ConfigError | None:
        return None if self.stream is not None else super().lack

    def check(self) -> None:
        if self.streamed is None and self.lack is None:
            super().check()
            return
        TextCorpus.check(self)
        self.filter.check("data.filter")
        if self.streamed is not None:
            self.streamed.check()

    def slices(self) -> Iterator[Slice]:
        if self.streamed is None:
            yield from super().slices()
            return
        for remote in self.streamed.files():
            yield Slice((*self.how, *remote.identity), remote.num_bytes, remote)

    def samples(self) -> list[Slice]:
        """Of a stream a few files, spread over it, since each is fetched whole."""
        slices = super().samples()
        return slices if self.streamed is None else slices[:: -(-len(slices) // SAMPLED)]

    def read_slice(self, slice: Slice, tokenizer: Path, on_bad: OnBad) -> Iterator[Document]:
        remote = slice.content
        if self.streamed is None or not isinstance(remote, Remote):
            yield from super().read_slice(slice, tokenizer, on_bad)
            return
        with self.streamed.fetched(remote) as file:
            yield from self.read(ranges_of(file, SLICE_BYTES, self.text_field), on_bad)
            file.path.unlink()  # whoever reads its start alone comes again

    def fingerprint(self) -> str:
        if self.streamed is None:
            return super().fingerprint()
        return digest(
            [*self.how, *(part for each in self.streamed.files() for part in each.identity)]
        )

    def num_bytes(self) -> int:
        return super().num_bytes() if self.streamed is None else self.streamed.num_bytes

    def files(self) -> list[File]:
        """The files of these data; all that are readable where ``path`` is no folder."""
        found = super().files()
        if not Path(str(self.path)).expanduser().is_dir():
            return found
        return [file for file in found if self.published.holds(file.id)]
