"""A teacher's targets of every token of some sequences, on disk (docs/teacher_cache.md)."""

# N sequences, B batch, L length, T tokens, V vocabulary, K targets of a token

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.cache import make_once
from llmtrain.errors import ConfigError
from llmtrain.kernel.divergence import TargetKind

if TYPE_CHECKING:
    from torch import Generator, Tensor

FORMAT = 1  # raise it when the files change, so that older caches are refused
FILES = ("teacher.json", "ids.npy", "log_probs.npy")


@dataclass(frozen=True)
class TeacherHeader:
    """What targets depend on: hashes of the teacher, its vocabulary and the manifest, and numbers.

    ``vocab_size`` is the number of ids that the vocabulary has, K is ``k``; ``seed`` that of draws.
    """

    teacher: str
    vocabulary: str
    vocab_size: int
    manifest: str
    seq_len: int
    kind: TargetKind
    k: int
    temperature: float
    precision: str
    seed: int | None

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "kind": self.kind.value}


@dataclass(frozen=True)
class TeacherCache:
    """Targets of ``num_sequences`` sequences, read from disk as they are asked for."""

    header: TeacherHeader
    ids_NLK: npt.NDArray[Any]
    log_probs_NLK: npt.NDArray[np.float16]

    @property
    def num_sequences(self) -> int:
        return len(self.ids_NLK)

    @classmethod
    def write(
        cls,
        folder: Path,
        header: TeacherHeader,
        num_sequences: int,
        targets: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    ) -> "TeacherCache":
        """Fill ``folder`` with ``(ids_LK, probs_LK)`` of each sequence in order, and open it.

        A folder that is whole already is opened as :meth:`open` does, and ``targets`` is not read.
        """

        def make(partial: Path) -> None:
            shape = (num_sequences, header.seq_len, header.k)
            id_dtype = "uint16" if header.vocab_size <= 2**16 else "uint32"
            new = np.lib.format.open_memmap
            ids_NLK = new(partial / "ids.npy", "w+", id_dtype, shape)
            log_probs_NLK = new(partial / "log_probs.npy", "w+", "float16", shape)
            for index, (ids_LK, probs_LK) in zip(range(num_sequences), targets, strict=True):
                ids_NLK[index] = ids_LK
                with np.errstate(divide="ignore"):  # a probability of 0 is stored as -inf
                    log_probs_NLK[index] = np.log(probs_LK)
            ids_NLK.flush()
            log_probs_NLK.flush()
            saved = {**header.as_json(), "num_sequences": num_sequences}
            text = json.dumps(saved, indent=2) + "\n"
            (partial / "teacher.json").write_text(text, encoding="utf-8")

        return cls.open(make_once(folder, is_whole, make), header)

    @classmethod
    def open(cls, folder: Path, expected: TeacherHeader) -> "TeacherCache":
        """The targets in ``folder``; ConfigError if there are none or they are not as expected."""
        if not is_whole(folder):
            reason = f"has no teacher's targets ({', '.join(FILES)})"
            raise ConfigError("mode.targets", folder, reason, "give a folder that has them")
        saved = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
        differing = [
            f"{name}={saved.get(name)} in place of {value}"
            for name, value in expected.as_json().items()
            if saved.get(name) != value
        ]
        if differing:
            reason = f"was made with {', '.join(differing)}"
            remedy = "delete the folder to make it again, or give another"
            raise ConfigError("mode.targets", folder, reason, remedy)
        ids_NLK, log_probs_NLK = (np.load(folder / name, mmap_mode="r") for name in FILES[1:])
        return cls(expected, ids_NLK, log_probs_NLK)

    def read(self, indices: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """``ids_BLK`` and ``probs_BLK`` of sequences by their numbers; draws sum to 1 exactly."""
        ids_BLK = self.ids_NLK[indices].astype(np.int64)
        probs_BLK = np.exp(self.log_probs_NLK[indices], dtype=np.float32)
        if self.header.kind is TargetKind.sampled:
            probs_BLK /= probs_BLK.sum(-1, keepdims=True)  # undoes the rounding to float16
        return ids_BLK, probs_BLK


def is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def targets_of(
    logits_TV: "Tensor",
    k: int,
    kind: TargetKind,
    temperature: float,
    generator: "Generator | None" = None,
) -> "tuple[Tensor, Tensor]":
    """``ids_TK`` (int64) and ``probs_TK`` (fp32) of a teacher's softened distributions.

    ``top_k`` are the K likeliest, likeliest first; ``sampled`` K independent draws by
    ``generator``, of probability 1/K each, where a token may come twice. Give only the columns
    that the student has, too.
    """
    import torch

    probs_TV = (logits_TV.float() / temperature).softmax(-1)
    if kind is TargetKind.top_k:
        probs_TK, ids_TK = probs_TV.topk(k)
        return ids_TK, probs_TK
    ids_TK = torch.multinomial(probs_TV, k, replacement=True, generator=generator)
    return ids_TK, torch.full_like(ids_TK, 1 / k, dtype=torch.float32)
