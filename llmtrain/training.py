"""Training of a filled folder by the ranks of this machine, alone or among others."""

import copy
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers import blocks
from launchers.place import Place
from llmtrain.checkpoint.store import mirror_of, newest_good
from llmtrain.config import Offload, Precision, RunConfig, load
from llmtrain.display import Progress, show_growth, show_summary
from llmtrain.errors import STOPPED, ConfigError, TrainingError
from llmtrain.folder import RunFolder, write_json
from llmtrain.on_finish import Afterwards
from llmtrain.plan import Plan, make_plan
from llmtrain.ranks import STACK_SIGNAL
from llmtrain.restarts import Reached, Restarts
from llmtrain.tracking import Tracking
from llmtrain.zero import swap_folder

if TYPE_CHECKING:
    from launchers.local import Ended
    from llmtrain.data.shards import Manifest

ECHOES = (signal.SIGABRT, STACK_SIGNAL)  # what ends a rank because another has ended
FIRST_STEPS = 10  # memory that runs out later was enough before: something grew


class Training:
    """Starts ranks until the run in a folder has ended, and says how it did."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        manifest: "Manifest",
        folder: RunFolder,
        place: Place = Place(),  # noqa: B008  (frozen)
    ) -> None:
        self.config = config
        self.plan = plan
        self.manifest = manifest
        self.folder = folder
        self.place = place
        self.restarts = Restarts(config.launcher.max_restarts)

    @classmethod
    def of(cls, folder: RunFolder, place: Place) -> "Training":
        """That of a folder which another process has filled, on this machine among others.

        Raises ConfigError where the plan is for other machines than there are.
        """
        from llmtrain.data.shards import Manifest

        if not folder.exists():
            reason, remedy = "is no run's folder", "fill one: python -m llmtrain.run"
            raise ConfigError("folder", folder.path, reason, remedy)
        config, plan = load(folder.config), Plan.load(folder.plan)
        if plan.num_nodes != place.num_nodes:
            reason = f"is not the plan's {plan.num_nodes}"
            remedy = "run the command again with another hardware.num_nodes"
            raise ConfigError("--num-nodes", place.num_nodes, reason, remedy)
        sources = json.loads(folder.manifest.read_text())
        return cls(config, plan, Manifest.load(Path(sources["folder"])), folder, place)

    def forget_errors(self) -> None:
        for error in self.errors():
            error.unlink(missing_ok=True)

    def notes(self) -> list[dict[str, Any]]:
        """What the ranks that failed said, the first to fail first."""
        found = [json.loads(path.read_text()) for path in self.errors() if path.exists()]
        return sorted(found, key=lambda note: note["time"])

    def errors(self) -> list[Path]:
        """Where each rank says what ended it."""
        return [self.folder.error(rank) for rank in range(self.plan.world_size)]

    def verify(self) -> None:
        """Find out now which checkpoint is whole; the ranks take the newest."""
        asked = self.config.checkpoint.mirror
        mirror = None if asked is None else mirror_of(asked, self.folder)
        newest_good(self.folder, mirror, print)

    def launch(self) -> None:
        """Train to the end, in sight of the tracker."""
        with Tracking(self.config.tracker, self.folder):
            self.train_to_end()

    def train_to_end(self) -> None:
        """As many starts as it takes and as are allowed."""
        self.forget_errors()
        ended = self.run_ranks()
        while self.mend(ended):
            self.forget_errors()
            ended = self.run_ranks()
        if self.config.debug and self.folder.first_batch.exists():
            print(self.folder.first_batch.read_text())
        self.conclude(ended)

    def mend(self, ended: "Ended") -> bool:
        """Prepare another start, with less memory at a time or as it was; False: none is due."""
        if not ended.was_cut_short or self.place.num_nodes > 1:  # others would have to know
            return False
        if self.ran_out_early() and self.plan.micro_batch > 1:
            self.halve_micro_batch()
            return True
        if any(note["is_final"] for note in self.notes()):
            return False
        if not self.restarts.is_worth_one(Reached(self.folder.newest_step, ended.step)):
            if self.restarts.is_stuck:
                print(f"Not started again: twice the ranks came to step {ended.step}, no further.")
            return False
        self.count_restart(ended)
        return True

    def count_restart(self, ended: "Ended") -> None:
        """Tell of one more start, on the terminal and in the status."""
        step = self.folder.newest_step
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
                environment=library_settings(self.config, self.plan.device),
                watch=progress.refresh,
                place=self.place,
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
        path, step = self.folder.next_plan, self.folder.newest_step
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
            step = self.folder.newest_step
            self.folder.write_status("stopped", step)
            what = f"Stopped at step {step} of {self.plan.num_steps}."
            print(f"{what} The same command continues it.")
            sys.exit(STOPPED)

    def failure(self, ended: "Ended") -> TrainingError:
        """The first cause in one line, and where the rest is."""
        text = self.cause(ended)
        if self.steps_to_out_of_memory() is not None:
            show_growth(self.folder, self.plan)
        self.folder.write_status("failed", self.folder.newest_step, error=text)
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

    def join(self) -> None:
        """Run this machine's ranks; the first machine speaks for all."""
        ended = self.run_ranks()
        if ended.was_cut_short:
            raise TrainingError(self.cause(ended))
        if ended.was_stopped:
            sys.exit(STOPPED)

    def train_filled(self, afterwards: Afterwards) -> None:
        """Train what another process has filled, on this machine among others."""
        if not self.place.is_first:
            self.join()
            return
        with self.folder.lock():
            if self.folder.read_status().get("state") == "done":
                return
            with afterwards.follow(self.config.on_finish, self.folder.path):
                self.verify()
                if self.folder.newest_step:
                    print(f"Continuing from step {self.folder.newest_step}.")
                self.launch()
                self.result()


def library_settings(config: RunConfig, device: str) -> dict[str, str]:
    """What the ranks' libraries are told."""
    found = {
        "DS_ACCELERATOR": device,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that a number means what nvidia-smi shows
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        found |= {"CUDA_VISIBLE_DEVICES": "", **blocks.preloaded(config.cache)}
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # blocks that leave no gaps
    # Else libraries compile small functions for minutes.
    found["TORCH_COMPILE_DISABLE"] = "0" if config.train.compile else "1"
    if config.debug:
        found["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    return found


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
