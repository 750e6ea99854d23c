"""The machine that is examined: each thing that several checks need, asked once."""

import subprocess
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.doctor import smi
from llmtrain.doctor.ask import ask
from llmtrain.doctor.holders import Holder, holders_of
from llmtrain.errors import ConfigError
from llmtrain.hardware import Gpu, all_gpus, visible_gpus

if TYPE_CHECKING:
    from llmtrain.config import RunConfig

HOLDERS = "--query-compute-apps=gpu_uuid,pid,used_memory,process_name"


class Patient:
    """Facts of this machine."""

    @cached_property
    def gpus(self) -> list[Gpu]:
        """What a run would see; none where that cannot be said, which a check of its own says."""
        try:
            return visible_gpus()
        except (ConfigError, subprocess.SubprocessError):
            return []

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def num_ranks(self) -> int:
        return len(self.gpus) or 1

    @cached_property
    def num_installed(self) -> int:
        return len(all_gpus())

    @cached_property
    def torch(self) -> dict[str, Any]:
        """Of :func:`llmtrain.doctor.answer.torch_facts`. Raises NoAnswer where torch fails."""
        found: dict[str, Any] = ask("torch", self.device)
        return found

    @property
    def holders(self) -> list[Holder]:
        """Who holds memory on the visible GPUs, now."""
        uuids = {gpu.uuid for gpu in self.gpus}
        return [holder for holder in holders_of(smi.rows(HOLDERS)) if holder.uuid in uuids]

    @property
    def used_gib(self) -> dict[str, float]:
        rows = smi.rows("--query-gpu=uuid,memory.used")
        known = [row for row in rows if len(row) == 2 and row[1].isdigit()]
        return {uuid: float(mib) / 1024 for uuid, mib in known}

    @cached_property
    def config(self) -> "RunConfig":
        """The default experiment, which says where outputs and caches go."""
        from llmtrain.compose import composed

        return composed([])

    @property
    def outputs(self) -> Path:
        return Path(self.config.output_root)
