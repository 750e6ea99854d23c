"""A run from its plan to its folder, and on to its ranks or to a queue."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.branch import begin, name_of, parent_of
from llmtrain.checkpoint import read_state
from llmtrain.compose import overrides
from llmtrain.config import RunConfig
from llmtrain.display import Progress
from llmtrain.errors import ConfigError
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.on_finish import Afterwards
from llmtrain.plan import Plan
from llmtrain.tracking import send_rest
from llmtrain.training import Training

if TYPE_CHECKING:
    from llmtrain.data.shards import Manifest


class Job:
    """A run folder that is claimed and filled, and then trained or queued."""

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
        self.parent = parent_of(config, plan)
        name = plan.name if self.parent is None else name_of(plan, config, self.parent)
        self.folder = RunFolder(Path(config.output_root) / name)

    def train(self, afterwards: Afterwards) -> float | None:
        """Bring the run to its end. Raises TrainingError if it fails; exits 75 if it is stopped.

        ``afterwards`` follows a run that is trained, and not one that was done before.
        """
        if self.config.launcher.queues:
            self.config.launcher.refuse_twin(self.folder)
        if self.config.resume == "never" and self.folder.exists():
            self.set_aside()
        with self.folder.lock() as left_by:
            if left_by is not None:
                print(f"The last start of this run, {left_by}, is gone and did not finish.")
            self.check_same_sources()
            if self.folder.read_status().get("state") == "done":
                print(f"{self.folder.path} is done.")
                send_rest(self.config.tracker, self.folder)
                return self.training().result()
            if self.parent is not None and not self.folder.exists():
                begin(self.folder, self.parent)
            self.training().verify()
            self.fill_folder()
            if not self.config.launcher.queues:
                with afterwards.follow(self.config.on_finish, self.folder.path):
                    self.training().launch()
                    return self.training().result()
        return self.queue()

    def training(self) -> Training:
        return Training(self.config, self.plan, self.manifest, self.folder)

    def queue(self) -> float | None:
        """Hand the folder to a queue; the loss is known only where its end was waited for."""
        with Progress(self.folder, self.plan) as progress:
            self.config.launcher.queue(self.folder, self.plan, progress.refresh)
        state = self.folder.read_status().get("state")
        return self.training().result() if state == "done" else None

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
            f"code than that of architecture {self.config.model.model_type}": (
                saved.code_fingerprint,
                self.plan.code_fingerprint,
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
        """The plan in force; None in a new folder, or where it is damaged or another version's."""
        try:
            return Plan.load(self.folder.plan)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def fill_folder(self) -> None:
        """Write what was asked and what was derived.

        On the same hardware and for the same words the earlier plan holds: a fresh search must not
        change the micro-batch, and with it the bits.
        """
        saved = self.saved_plan()
        if saved is not None and same_machine(saved, self.plan) and saved.asked == self.plan.asked:
            self.plan = saved
        self.check_layout()
        if self.plan is not saved:
            write_json(self.folder.next_plan, self.plan.to_json())
        write_text(self.folder.overrides, shlex.join(overrides()) + "\n")
        sources = {"folder": self.manifest.folder, "teacher_targets": self.targets}
        found = {name: str(path) for name, path in sources.items() if path is not None}
        write_json(self.folder.manifest, found)
        write_text(self.folder.config, self.config.to_yaml())
        newest = self.folder.newest_step
        if newest:
            print(f"Continuing from step {newest}.")
        self.folder.write_status("planned", newest, num_steps=self.plan.num_steps)

    def check_layout(self) -> None:
        """Raise ConfigError where a state that fits one layout alone would meet another one."""
        newest = self.folder.newest_step
        if self.config.optimizer.moves or not newest:
            return
        saved = read_state(self.folder.checkpoint(newest))
        was = saved["zero_stage"], saved["world_size"] if saved["zero_stage"] else None
        now = self.plan.zero_stage, self.plan.world_size if self.plan.zero_stage else None
        if was != now:
            key, before = "optimizer", f"on {saved['world_size']} ranks at stage {was[0]}"
            reason = f"was saved {before}, and its blocks fit no other"
            remedy = f"continue with so many ranks and zero.stage={was[0]}, or set resume=never"
            raise ConfigError(key, self.config.optimizer.kind, reason, remedy)


def same_machine(one: Plan, other: Plan) -> bool:
    return (one.device_name, one.world_size) == (other.device_name, other.world_size)
