"""Where data sets and weights come from: the Hugging Face hub, a mirror of it, or ModelScope."""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.errors import ConfigError, TrainingError
from llmtrain.hub import answers, endpoint, is_offline

MIRROR = "https://hf-mirror.com"


class File(NamedTuple):
    """A file of a repository by its relative path, and its size in bytes."""

    path: str
    size: int


class Repository(ABC):
    """A data set's or model's files somewhere; ``revision`` is known once they were listed."""

    name: str
    revision: str

    @abstractmethod
    def files(self) -> list[File]:
        """Every file, sorted; ConfigError where they cannot be had."""

    @abstractmethod
    def fetch(self, patterns: Sequence[str], folder: Path) -> None:
        """Bring the files of these patterns into the folder; TrainingError where it breaks off."""

    def clear(self, folder: Path) -> None:  # noqa: B027  (most have nothing to clear)
        """Remove what a download that was killed left half done, and nobody can continue."""


class HuggingFace(Repository):
    """A repository of the hub, or of the mirror that HF_ENDPOINT names."""

    def __init__(self, name: str, revision: str, is_model: bool) -> None:
        self.name = name
        self.revision = revision
        self.kind = "model" if is_model else "dataset"

    def __str__(self) -> str:
        return self.page

    @property
    def page(self) -> str:
        folder = "" if self.kind == "model" else "datasets/"
        return f"{endpoint()}/{folder}{self.name}"

    def files(self) -> list[File]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        self.require_answer()
        api = HfApi(endpoint=endpoint())
        with self.explained():
            info = api.repo_info(self.name, repo_type=self.kind, revision=self.revision)
            self.revision = str(info.sha)
            tree = api.list_repo_tree(
                self.name, recursive=True, revision=self.revision, repo_type=self.kind
            )
            return sorted(File(item.path, item.size) for item in tree if isinstance(item, RepoFile))

    def fetch(self, patterns: Sequence[str], folder: Path) -> None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not sys.stderr.isatty():
            disable_progress_bars()
        with self.explained():
            snapshot_download(
                self.name,
                repo_type=self.kind,
                revision=self.revision,
                local_dir=folder,
                allow_patterns=list(patterns),
                endpoint=endpoint(),
            )

    def bring(self, name: str, folder: Path) -> None:
        """Fetch one file to its place in the folder."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        self.require_answer()
        disable_progress_bars()
        with self.explained():
            hf_hub_download(
                self.name,
                name,
                repo_type=self.kind,
                revision=self.revision,
                local_dir=folder,
                endpoint=endpoint(),
            )

    def clear(self, folder: Path) -> None:
        for path in (folder / ".cache" / "huggingface").rglob("*.incomplete"):
            path.unlink(missing_ok=True)

    def require_answer(self) -> None:
        """Refuse at once, in one line, where there is no way to the hub."""
        if is_offline():
            remedy = "unset it to download"
            raise ConfigError("HF_HUB_OFFLINE", "1", "keeps the hub's library offline", remedy)
        if not answers(endpoint()):
            remedy = f"set a mirror (export HF_ENDPOINT={MIRROR}), or say --from modelscope"
            raise ConfigError("HF_ENDPOINT", endpoint(), "does not answer", remedy)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the library's errors into one line each."""
        from huggingface_hub import errors
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx

        try:
            yield
        except errors.GatedRepoError:
            remedy = f"accept them on {self.page}, then log in: hf auth login"
            raise ConfigError("download", self.name, "wants its terms accepted", remedy) from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            reason = f"does not exist at {endpoint()}, or is private"
            remedy = "correct it, give a copy with --id org/name, or log in: hf auth login"
            raise ConfigError("download", self.name, reason, remedy) from None
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            raise broken(self, error) from None


class ModelScope(Repository):
    """A repository of modelscope.cn, or of the address that MODELSCOPE_ENDPOINT names."""

    def __init__(self, name: str, is_model: bool) -> None:
        self.name = name
        self.revision = "master"
        self.kind = "model" if is_model else "dataset"

    def __str__(self) -> str:
        return f"{modelscope_endpoint()}/{self.kind}s/{self.name}"

    def files(self) -> list[File]:
        api = modelscope_api()
        with self.explained():
            found = api.list_repo_files(self.name, self.kind, revision=self.revision)
        return sorted(File(item.path, item.size) for item in found if not item.is_dir)

    def fetch(self, patterns: Sequence[str], folder: Path) -> None:
        api, options = modelscope_api(), {"allow_patterns": list(patterns), "local_dir": folder}
        with self.explained():
            api.download_repo(self.name, self.kind, revision=self.revision, **options)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the library's errors into one line each."""
        from modelscope_hub import errors

        try:
            yield
        except (errors.NotExistError, errors.PermissionDeniedError, errors.AuthenticationError):
            remedy = f"look at {self}: it may have another name, or terms to accept"
            reason = "does not exist at ModelScope, or is not for everybody"
            raise ConfigError("download", self.name, reason, remedy) from None
        except (errors.HubError, OSError, ValueError, RuntimeError) as error:
            raise broken(self, error) from None


def modelscope_endpoint() -> str:
    return (os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn").rstrip("/")


def modelscope_api() -> Any:
    """Its library's door; ConfigError where that is missing, or nothing answers."""
    try:
        from modelscope_hub import HubApi
    except ImportError:
        remedy = "pip install -c constraints.txt -e '.[modelscope]'"
        reason = "needs the package modelscope-hub"
        raise ConfigError("--from", "modelscope", reason, remedy) from None
    if not answers(modelscope_endpoint()):
        remedy = "look at the network, or set MODELSCOPE_ENDPOINT"
        raise ConfigError("--from", "modelscope", "does not answer", remedy)
    getLogger("modelscope_hub").setLevel(WARNING)  # it tells of each page that it lists
    return HubApi()


def broken(repository: Repository, error: Exception) -> TrainingError:
    """A download that started and could not end."""
    said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return TrainingError(f"{repository} broke off ({said}). The same command continues.")
