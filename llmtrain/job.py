"""One run from its plan to its end, seen from the process that launches the ranks."""

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.compose import overrides
from llmtrain.config import RunConfig
from llmtrain.display import Progress, show_summary
from llmtrain.errors import STOPPED, ConfigError, TrainingError
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.plan import Plan

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest


class Job:
    """A run folder that is claimed, filled, trained and reported on."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        manifest: "Manifest",
        targets: Path | None = None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.manifest = manifest
        self.targets = targets
        self.folder = RunFolder(Path(config.output_root) / plan.name)

    def train(self) -> float | None:
        """Bring the run to its end. Raises TrainingError if it fails; exits 75 if it is stopped."""
        if self.config.resume == "never" and self.folder.exists():
            self.set_aside()
        with self.folder.lock():
            self.check_same_sources()
            if self.folder.read_status().get("state") == "done":
                print(f"{self.folder.path} is done.")
                return self.result()
            self.fill_folder()
            self.launch()
            return self.result()

    def set_aside(self) -> None:
        """Keep what is there under another name, all at once."""
        path = self.folder.path
        aside = path.with_name(f"{path.name}.{time.time_ns()}")
        with self.folder.lock():
            path.rename(aside)
        print(f"The earlier run was moved to {aside}.")

    def check_same_sources(self) -> None:
        """The identity leaves out where data and weights lie, so their content is compared."""
        saved = self.saved_plan()
        if saved is None:
            return
        sources = {
            f"data than data.path={self.config.data.path}": (
                saved.data.fingerprint,
                self.plan.data.fingerprint,
            ),
            f"weights than model.path={self.config.model.path}": (
                saved.weights_fingerprint,
                self.plan.weights_fingerprint,
            ),
            f"teacher's weights than teacher.path={self.plan.teacher}": (
                saved.teacher_fingerprint,
                self.plan.teacher_fingerprint,
            ),
        }
        for what, (before, now) in sources.items():
            if before != now:
                reason = f"holds a run on other {what}"
                raise ConfigError("name", self.config.name, reason, "give this run its own name")

    def saved_plan(self) -> Plan | None:
        """The plan in force; None in a new folder, or where another version wrote it."""
        try:
            return Plan.load(self.folder.plan)
        except (FileNotFoundError, KeyError, TypeError):
            return None

    def fill_folder(self) -> None:
        """Write what was asked and what was derived.

        On the same hardware and for the same words the earlier plan holds: a fresh search must not
        change the micro-batch, and with it the bits.
        """
        saved = self.saved_plan()
        if saved is not None and same_machine(saved, self.plan) and saved.asked == self.plan.asked:
            self.plan = saved
        else:
            write_json(self.folder.next_plan, self.plan.to_json())
        write_text(self.folder.overrides, shlex.join(overrides()) + "\n")
        sources = {"folder": self.manifest.folder, "teacher_targets": self.targets}
        found = {name: str(path) for name, path in sources.items() if path is not None}
        write_json(self.folder.manifest, found)
        write_text(self.folder.config, self.config.to_yaml())
        if self.newest_step():
            print(f"Continuing from step {self.newest_step()}.")
        self.folder.write_status("planned", self.newest_step())
        for error in self.errors():
            error.unlink(missing_ok=True)

    def errors(self) -> list[Path]:
        """Where each rank says what ended it."""
        return [self.folder.error(rank) for rank in range(self.plan.gpus_per_node)]

    def newest_step(self) -> int:
        return max(self.folder.checkpoint_steps(), default=0)

    def launch(self) -> None:
        """Start the ranks and watch the folder until they end."""
        command = [sys.executable, "-u", "-m", "llmtrain.train", str(self.folder.path)]
        with Progress(self.folder, self.plan) as progress:
            ended = self.config.launcher.launch(
                command,
                ranks=self.plan.gpus_per_node,
                threads=self.plan.threads_per_rank,
                environment=self.environment(),
                watch=progress.refresh,
            )
        if self.config.debug and self.folder.first_batch.exists():
            print(self.folder.first_batch.read_text())
        self.conclude(ended.failures, ended.was_stopped)

    def conclude(self, failures: dict[int, int], was_stopped: bool) -> None:
        """Say how the ranks ended, unless they are done."""
        was_killed = all(code < 0 for code in failures.values())
        if failures and not (was_stopped and was_killed):
            raise self.failure(failures)
        if was_stopped and self.folder.read_status()["state"] != "done":
            step = self.newest_step()
            self.folder.write_status("stopped", step)
            what = f"Stopped at step {step} of {self.plan.num_steps}."
            print(f"{what} The same command continues it.")
            sys.exit(STOPPED)

    def environment(self) -> dict[str, str]:
        """What the ranks' libraries are told."""
        found = {
            "DS_ACCELERATOR": self.plan.device,
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that a number means what nvidia-smi shows
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.plan.device == "cpu":
            found["CUDA_VISIBLE_DEVICES"] = ""
        if not self.config.train.compile:
            found["TORCH_COMPILE_DISABLE"] = "1"  # libraries compile small functions for minutes
        if self.config.debug:
            found["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        return found

    def failure(self, codes: dict[int, int]) -> TrainingError:
        """The first cause in one line, and where the rest is."""
        text = self.cause(codes)
        self.folder.write_status("failed", self.newest_step(), error=text)
        where = os.path.relpath(self.folder.logs)
        return TrainingError(
            f"Training failed: {text} Logs: {where}. The same command continues it."
        )

    def cause(self, codes: dict[int, int]) -> str:
        """A rank that was killed comes first: what its peers say of lost connections follows."""
        for rank, code in codes.items():
            if code < 0 and code != -signal.SIGTERM and not self.folder.error(rank).exists():
                memory = " (out of memory?)" if code == -signal.SIGKILL else ""
                return f"Rank {rank} was killed by signal {-code}{memory}."
        notes = [json.loads(path.read_text()) for path in self.errors() if path.exists()]
        if not notes:
            return f"Ranks ended with exit codes {codes}."
        first = min(notes, key=lambda note: note["time"])
        return str(first["error"]) + (f"\n{first['traceback']}" if self.config.debug else "")

    def result(self) -> float | None:
        """Print the closing summary and give the final held-out loss."""
        summary = json.loads(self.folder.summary.read_text())
        show_summary(self.folder, summary)
        return float(summary["eval_loss"])


def same_machine(one: Plan, other: Plan) -> bool:
    return (one.device_name, one.world_size) == (other.device_name, other.world_size)
