"""Rows that others published: a data set of the catalogue, where its download put it."""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.published import PublishedCorpus
from llmtrain.data.source.chat import Chat


@dataclass
class PublishedChat(PublishedCorpus, Chat):
    """The rows of ``path`` that the catalogue names."""

    kind: str = "published_chat"

    def paths(self) -> dict[str, str]:
        """The paths that are set, by their keys; of a folder, the files of these data."""
        found = super().paths()
        folder = Path(found.get("data.path", "")).expanduser()
        if "data.path" in found and folder.is_dir():
            (pattern,) = self.published.files
            found["data.path"] = str(folder / pattern)
        return found

    def check_source(self) -> None:
        if self.lack is None:
            super().check_source()
