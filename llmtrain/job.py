"""One run from its plan to its end, seen from the process that launches the ranks."""

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.compose import overrides
from llmtrain.config import RunConfig, load
from llmtrain.display import Progress, show_summary
from llmtrain.errors import STOPPED, ConfigError, TrainingError
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.plan import Plan

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest


class Job:
    """A run folder that is claimed, filled, trained and reported on."""

    def __init__(self, config: RunConfig, plan: Plan, manifest: "Manifest") -> None:
        self.config = config
        self.plan = plan
        self.manifest = manifest
        self.folder = RunFolder(Path(config.output_root) / plan.name)

    def train(self) -> float | None:
        """Bring the run to its end. Raises TrainingError if it fails; exits 75 if it is stopped."""
        with self.folder.lock():
            self.set_aside()
            self.check_same_data()
            if self.folder.read_status().get("state") == "done":
                print(f"{self.folder.path} is done.")
                return self.result()
            self.fill_folder()
            self.launch()
            return self.result()

    def set_aside(self) -> None:
        """With resume=never, what is there is kept under another name."""
        if self.config.resume == "never" and self.folder.exists():
            aside = self.folder.path.with_name(
                f"{self.folder.path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
            )
            aside.mkdir()
            for item in self.folder.path.iterdir():
                if item.name not in (".lock", ".holder"):
                    shutil.move(item, aside / item.name)
            print(f"The earlier run was moved to {aside}.")

    def check_same_data(self) -> None:
        """The identity leaves out where data lie, so their content is compared."""
        if not self.folder.exists():
            return
        saved = Plan.load(self.folder.plan).data.fingerprint
        if saved != self.plan.data.fingerprint:
            reason = f"holds a run on other data than data.path={self.config.data.path}"
            raise ConfigError("name", self.config.name, reason, "give this run a name of its own")

    def fill_folder(self) -> None:
        """Write what was asked and what was derived; a plan that still holds is kept."""
        if self.folder.exists() and self.plan_still_holds():
            self.plan = Plan.load(self.folder.plan)
        else:
            write_json(self.folder.next_plan, self.plan.to_json())
        write_text(self.folder.overrides, shlex.join(overrides()) + "\n")
        write_json(self.folder.manifest, {"folder": str(self.manifest.folder)})
        write_text(self.folder.config, self.config.to_yaml())
        self.folder.write_status("planned", self.newest_step())

    def plan_still_holds(self) -> bool:
        """Whether the same was asked of the same hardware: then the micro-batch must not change."""
        saved, old = load(self.folder.config), Plan.load(self.folder.plan)
        same_machine = (old.device_name, old.world_size) == (
            self.plan.device_name,
            self.plan.world_size,
        )
        return same_machine and saved.to_yaml() == self.config.to_yaml()

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
        if ended.was_stopped and all(code < 0 for code in ended.failures.values()):
            self.folder.write_status("stopped", self.newest_step())  # also before the first step
        elif ended.failures:
            raise self.failure(ended.failures)
        if self.folder.read_status()["state"] == "stopped":
            step = self.newest_step()
            print(
                f"Stopped at step {step} of {self.plan.num_steps}. The same command continues it."
            )
            sys.exit(STOPPED)

    def environment(self) -> dict[str, str]:
        """What the ranks' libraries are told."""
        found = {
            "DS_ACCELERATOR": self.plan.device,
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
        """The first error in one line, and where the rest is."""
        errors = [self.folder.error(rank) for rank in range(self.plan.gpus_per_node)]
        notes = [json.loads(path.read_text()) for path in errors if path.exists()]
        if notes:
            first = min(notes, key=lambda note: note["time"])
            text = first["error"] + (f"\n{first['traceback']}" if self.config.debug else "")
        else:
            rank, code = next(iter(codes.items()))
            text = (
                f"Rank {rank} was killed by signal {-code}."
                if code < 0
                else f"Rank {rank} exited {code}."
            )
        self.folder.write_status("failed", self.newest_step(), error=text)
        where = os.path.relpath(self.folder.logs)
        return TrainingError(
            f"Training failed: {text} Logs: {where}. The same command continues it."
        )

    def result(self) -> float | None:
        """Print the closing summary and give the final held-out loss."""
        summary = json.loads(self.folder.summary.read_text())
        show_summary(self.folder, summary)
        return float(summary["eval_loss"])
