"""One run from its plan to its end, seen from the process that launches the ranks."""

import copy
import json
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers import blocks
from llmtrain.branch import begin, name_of, parent_of
from llmtrain.checkpoint import read_state
from llmtrain.checkpoint.store import mirror_of, newest_good
from llmtrain.compose import overrides
from llmtrain.config import Offload, Precision, RunConfig
from llmtrain.display import Progress, show_growth, show_summary
from llmtrain.errors import STOPPED, ConfigError, TrainingError
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.on_finish import Afterwards
from llmtrain.plan import Plan, make_plan
from llmtrain.ranks import STACK_SIGNAL
from llmtrain.restarts import Reached, Restarts
from llmtrain.zero import swap_folder

if TYPE_CHECKING:
    from launchers.local import Ended
    from llmtrain.data.shards import Manifest

ECHOES = (signal.SIGABRT, STACK_SIGNAL)  # what ends a rank because another has ended
FIRST_STEPS = 10  # memory that runs out later was enough before: something grew


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
        self.parent = parent_of(config, plan)
        name = plan.name if self.parent is None else name_of(plan, config, self.parent)
        self.folder = RunFolder(Path(config.output_root) / name)
        self.restarts = Restarts(config.launcher.max_restarts)

    def train(self, afterwards: Afterwards) -> float | None:
        """Bring the run to its end. Raises TrainingError if it fails; exits 75 if it is stopped.

        ``afterwards`` follows a run that is trained, and not one that was done before.
        """
        if self.config.resume == "never" and self.folder.exists():
            self.set_aside()
        with self.folder.lock() as left_by:
            if left_by is not None:
                print(f"The last start of this run, {left_by}, is gone and did not finish.")
            self.check_same_sources()
            if self.folder.read_status().get("state") == "done":
                print(f"{self.folder.path} is done.")
                return self.result()
            if self.parent is not None and not self.folder.exists():
                begin(self.folder, self.parent)
            self.verify()
            self.fill_folder()
            with afterwards.follow(self.config.on_finish, self.folder.path):
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
        if self.newest_step():
            print(f"Continuing from step {self.newest_step()}.")
        self.folder.write_status("planned", self.newest_step(), num_steps=self.plan.num_steps)
        self.forget_errors()

    def forget_errors(self) -> None:
        for error in self.errors():
            error.unlink(missing_ok=True)

    def notes(self) -> list[dict[str, Any]]:
        """What the ranks that failed said, the first to fail first."""
        found = [json.loads(path.read_text()) for path in self.errors() if path.exists()]
        return sorted(found, key=lambda note: note["time"])

    def errors(self) -> list[Path]:
        """Where each rank says what ended it."""
        return [self.folder.error(rank) for rank in range(self.plan.gpus_per_node)]

    def verify(self) -> None:
        """Find out now which checkpoint is whole; the ranks take the newest."""
        asked = self.config.checkpoint.mirror
        mirror = None if asked is None else mirror_of(asked, self.folder)
        newest_good(self.folder, mirror, print)

    def check_layout(self) -> None:
        """Raise ConfigError where a state that fits one layout alone would meet another one."""
        if self.config.optimizer.moves or not self.newest_step():
            return
        saved = read_state(self.folder.checkpoint(self.newest_step()))
        was = saved["zero_stage"], saved["world_size"] if saved["zero_stage"] else None
        now = self.plan.zero_stage, self.plan.world_size if self.plan.zero_stage else None
        if was != now:
            key, before = "optimizer", f"on {saved['world_size']} ranks at stage {was[0]}"
            reason = f"was saved {before}, and its blocks fit no other"
            remedy = f"continue with so many ranks and zero.stage={was[0]}, or set resume=never"
            raise ConfigError(key, self.config.optimizer.kind, reason, remedy)

    def newest_step(self) -> int:
        return max(self.folder.checkpoint_steps(), default=0)

    def launch(self) -> None:
        """Train to the end, with as many starts as it takes and as are allowed."""
        ended = self.run_ranks()
        while self.mend(ended):
            self.forget_errors()
            ended = self.run_ranks()
        if self.config.debug and self.folder.first_batch.exists():
            print(self.folder.first_batch.read_text())
        self.conclude(ended)

    def mend(self, ended: "Ended") -> bool:
        """Prepare another start, with less memory at a time or as it was; False: none is due."""
        if not ended.was_cut_short:
            return False
        if self.ran_out_early() and self.plan.micro_batch > 1:
            self.halve_micro_batch()
            return True
        if any(note["is_final"] for note in self.notes()):
            return False
        if not self.restarts.is_worth_one(Reached(self.newest_step(), ended.step)):
            if self.restarts.is_stuck:
                print(f"Not started again: twice the ranks came to step {ended.step}, no further.")
            return False
        self.count_restart(ended)
        return True

    def count_restart(self, ended: "Ended") -> None:
        """Tell of one more start, on the terminal and in the status."""
        step = self.newest_step()
        print(f"{self.cause(ended)} {self.restarts} from step {step}.")
        before = self.folder.read_status().get("restarts", 0)
        self.folder.write_status("planned", step, restarts=before + 1)

    def run_ranks(self) -> "Ended":
        """Start the ranks and watch the folder until they end."""
        command = [sys.executable, "-u", "-m", "llmtrain.train", str(self.folder.path)]
        with Progress(self.folder, self.plan) as progress:
            ended: Ended = self.config.launcher.launch(
                command,
                self.folder,
                ranks=self.plan.gpus_per_node,
                threads=self.plan.threads_per_rank,
                environment=self.environment(),
                watch=progress.refresh,
            )
        if self.plan.nvme_path is not None:
            shutil.rmtree(swap_folder(self.plan), ignore_errors=True)
        return ended

    def ran_out_early(self) -> bool:
        """Whether memory ended in the first steps since the ranks started."""
        steps = self.steps_to_out_of_memory()
        return steps is not None and steps < FIRST_STEPS

    def steps_to_out_of_memory(self) -> int | None:
        """How many steps were taken when the first rank had no memory left; None: all had."""
        found = [note["out_of_memory_after_steps"] for note in self.notes()]
        return min((steps for steps in found if steps is not None), default=None)

    def halve_micro_batch(self) -> None:
        """Put a plan with more, smaller micro-batches into force, beside the earlier ones."""
        path, step = self.folder.next_plan, self.newest_step()
        plan = halved(self.plan, self.config, self.manifest)
        write_json(path, plan.to_json())
        was, now = self.plan.micro_batch, plan.micro_batch
        print(f"Out of memory with micro_batch {was}: again from step {step} with {now} ({path}).")
        self.plan = plan
        self.folder.write_status("planned", step)

    def conclude(self, ended: "Ended") -> None:
        """Say how the ranks ended, unless they are done."""
        was_killed = all(code < 0 for code in ended.failures.values())
        if ended.was_cut_short or not was_killed:
            raise self.failure(ended)
        if self.folder.read_status()["state"] != "done":
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
            found |= {"CUDA_VISIBLE_DEVICES": "", **blocks.preloaded(self.config.cache)}
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
            found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # blocks that leave no gaps
        if not self.config.train.compile:
            found["TORCH_COMPILE_DISABLE"] = "1"  # libraries compile small functions for minutes
        if self.config.debug:
            found["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        return found

    def failure(self, ended: "Ended") -> TrainingError:
        """The first cause in one line, and where the rest is."""
        text = self.cause(ended)
        if self.steps_to_out_of_memory() is not None:
            show_growth(self.folder, self.plan)
        self.folder.write_status("failed", self.newest_step(), error=text)
        where = os.path.relpath(self.folder.logs)
        return TrainingError(
            f"Training failed: {text} Logs: {where}. The same command continues it."
        )

    def cause(self, ended: "Ended") -> str:
        """A rank that was killed comes first: what its peers say of lost connections follows."""
        if ended.hang is not None:
            return ended.hang
        notes, codes = self.notes(), ended.failures
        for rank, code in codes.items():
            is_echo = -code in ECHOES and bool(notes)
            if code < 0 and not is_echo and not self.folder.error(rank).exists():
                memory = " (out of memory?)" if code == -signal.SIGKILL else ""
                return f"Rank {rank} was killed by signal {-code}{memory}."
        if not notes:
            return f"Ranks ended with exit codes {codes}."
        first = notes[0]
        return str(first["error"]) + (f"\n{first['traceback']}" if self.config.debug else "")

    def result(self) -> float | None:
        """Print the closing summary and give the final held-out loss."""
        summary = json.loads(self.folder.summary.read_text())
        show_summary(self.folder, summary)
        return float(summary["eval_loss"])


def same_machine(one: Plan, other: Plan) -> bool:
    return (one.device_name, one.world_size) == (other.device_name, other.world_size)


def halved(plan: Plan, config: RunConfig, manifest: "Manifest") -> Plan:
    """The plan with at most half the micro-batch and as many more of them, all else as it is."""
    share = plan.micro_batch * plan.grad_accum
    half = max(size for size in range(1, plan.micro_batch // 2 + 1) if share % size == 0)
    same = copy.deepcopy(config)
    same.train.micro_batch = half
    same.train.precision = Precision(plan.precision)
    same.train.activation_checkpointing = plan.activation_checkpointing
    same.zero.stage = plan.zero_stage
    same.zero.offload_optimizer = Offload(plan.offload_optimizer)
    same.zero.offload_params = Offload(plan.offload_params)
    reason = f"memory ran out with micro_batch {plan.micro_batch}"
    reasons = plan.reasons | {"micro_batch": reason}
    return replace(make_plan(same, manifest), name=plan.name, asked=plan.asked, reasons=reasons)
