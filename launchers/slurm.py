"""Slurm: a job that trains a run's folder, with what the plan says that it needs."""

import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from launchers.local import Local
from llmtrain.errors import STOPPED, ConfigError
from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.schema import unlearned, unlearned_part

if TYPE_CHECKING:
    from llmtrain.plan import Plan

PACKAGES = ("llmtrain", "launchers", "conf")
TIME_MARGIN, STARTING_MINUTES = 1.25, 10
IMPORTS_GIB = 1.5  # of a rank, beside what the plan counts
MEMORY_MARGIN = 1.1
POLL_SECONDS = 2.0
MOST_IN_ARRAY = 1000  # MaxArraySize is 1001 where nobody has set it
UNHEARD = 128 + signal.SIGUSR2  # srun's exit code for a task that the signal ended
LIVES = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "STOPPED")
IS_LIVE = {*LIVES, "UNKNOWN"}  # until somebody answers


@dataclass
class Slurm(Local):
    """A Slurm cluster; the folder has to lie where every node sees it.

    ``time_hours`` is the job's limit (null: the plan's time and a quarter), ``signal_seconds``
    before which the ranks are asked to save; the job then goes back into the queue, at most
    ``max_requeues`` times. ``options`` are further options of sbatch by name, ``setup`` lines of
    shell before the ranks start. ``submit=false`` prints the script and queues nothing, ``wait``
    stays until the job has ended.
    """

    kind: str = "slurm"
    queues: ClassVar[bool] = True
    gathers = False  # set where many folders are filled before any is queued
    partition: str | None = unlearned()
    account: str | None = unlearned()
    qos: str | None = unlearned()
    time_hours: float | None = unlearned(above=0)
    memory_gib: float | None = unlearned(above=0)
    signal_seconds: int = unlearned(120, low=1)
    max_requeues: int = unlearned(20, low=0)
    submit: bool = unlearned(True)
    wait: bool = unlearned(False)
    options: dict[str, Any] = unlearned_part(dict)
    setup: list[str] = unlearned_part(list)

    def check(self, device: str, ranks: int, num_nodes: int) -> None:
        """Raise ConfigError where there is no Slurm to queue a job in."""
        if self.submit and shutil.which("sbatch") is None:
            remedy = "log in where sbatch is, or see the script with launcher.submit=false"
            raise ConfigError("launcher", "slurm", "finds no sbatch on this machine", remedy)

    def queue(self, folder: RunFolder, plan: "Plan", watch: Callable[[], None]) -> None:
        """Queue a job that trains the folder. Raises ConfigError where Slurm refuses it."""
        folder = RunFolder(folder.path.absolute())
        script, text = folder.path / "job.sh", self.script(folder, plan)
        folder.logs.mkdir(exist_ok=True)
        freeze_code(code_of(folder))
        write_text(script, text)
        if not self.submit:
            print(f"{script}:\n\n{text}")
        if self.submit and not self.gathers:
            job = submitted(script)
            self.note(folder, job)
            if self.wait:
                follow(job, watch)

    def note(self, folder: RunFolder, job: str) -> None:
        """Say in the folder, and here, which job trains it."""
        write_json(folder.path / "slurm.json", {"job": job})
        folder.write_status("queued", folder.newest_step)
        print(f"Slurm job {job}: {folder.path}")
        print(f"Log: {self.log(folder).replace('%j', job)}")

    def queue_gathered(self, folders: list[RunFolder], place: Path) -> None:
        """Queue folders that were gathered: those that need the same as one array of jobs."""
        folders = [RunFolder(folder.path.absolute()) for folder in folders]
        by_need: dict[str, list[RunFolder]] = {}
        for folder in folders:
            by_need.setdefault(needs_of(folder), []).append(folder)
        parts = [
            (needs, alike[first : first + MOST_IN_ARRAY])
            for needs, alike in by_need.items()
            for first in range(0, len(alike), MOST_IN_ARRAY)
        ]
        for number, (needs, alike) in enumerate(parts):
            if len(alike) == 1:
                self.note(alike[0], submitted(alike[0].path / "job.sh"))
                continue
            script = place.absolute() / "jobs" / f"array_{number}.sh"
            write_text(script.with_suffix(".txt"), "".join(f"{each.path}\n" for each in alike))
            write_text(script, array_script(needs, script, len(alike)))
            job = submitted(script)
            for task, folder in enumerate(alike):
                self.note(folder, f"{job}_{task}")

    def refuse_twin(self, folder: RunFolder) -> None:
        """Raise ConfigError where a job for the folder is in the queue."""
        job = job_of(folder)
        state = None if job is None else state_of(job)
        if state in IS_LIVE:
            reason = f"is {str(state).lower()} as Slurm job {job}"
            raise ConfigError("name", folder.path.name, reason, f"wait for it, or scancel {job}")

    def is_live(self, folder: RunFolder) -> bool:
        """Whether a job for the folder waits or runs."""
        job = job_of(folder)
        return job is not None and state_of(job) in IS_LIVE

    def cancel(self, folder: RunFolder) -> None:
        """Have the folder's job save and leave the queue."""
        subprocess.run(["scancel", str(job_of(folder))], check=False)

    def log(self, folder: RunFolder) -> str:
        return str(folder.logs / "slurm_%j.log")

    def script(self, folder: RunFolder, plan: "Plan") -> str:
        """The batch script."""
        options = "\n".join(f"#SBATCH {option_of(*each)}" for each in self.given(folder, plan))
        code, run = shlex.quote(str(code_of(folder))), shlex.quote(str(folder.path))
        setup = "".join(f"{line}\n" for line in self.setup)
        return f"""#!/bin/bash
{options}
# The code as it was when this was queued, also where the job starts in a checkout (Python 3.11).
export PYTHONSAFEPATH=1 PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
{setup}srun --kill-on-bad-exit=1 {shlex.quote(sys.executable)} -u -m llmtrain.node {run}
code=$?
# Stopped with a checkpoint, and not by scancel: the time is over or somebody else goes first. The
# signal may even come before Python listens, and then ends it.
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
if [ $code -eq {STOPPED} -o $code -eq {UNHEARD} ] && [ "$state" = RUNNING ] \\
    && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {self.max_requeues} ]; then
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit $code
"""

    def given(self, folder: RunFolder, plan: "Plan") -> list[tuple[str, Any]]:
        """The options of sbatch: what the plan needs, and what was asked for."""
        memory = self.memory_gib or memory_gib(plan)
        found: dict[str, Any] = {
            "job-name": plan.name,
            "nodes": plan.num_nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": plan.threads_per_rank * plan.gpus_per_node,
            "gpus-per-node": plan.gpus_per_node if plan.device == "cuda" else None,
            "mem": f"{math.ceil(memory * 1024)}M",
            "time": self.minutes(plan),
            "signal": f"USR2@{self.signal_seconds}",
            "requeue": True,
            "open-mode": "append",
            "output": self.log(folder),
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
        }
        found |= {name.replace("_", "-"): value for name, value in self.options.items()}
        return [(name, value) for name, value in found.items() if value not in (None, False)]

    def minutes(self, plan: "Plan") -> int | None:
        if self.time_hours is not None:
            return math.ceil(60 * self.time_hours)
        if plan.total_hours is None:
            return None
        return math.ceil(60 * TIME_MARGIN * plan.total_hours) + STARTING_MINUTES


def memory_gib(plan: "Plan") -> float:
    """Of a node: what the plan counts on the host, and the imports of each rank."""
    name = "host_peak_gib" if plan.device == "cuda" else "device_peak_gib"
    return MEMORY_MARGIN * plan.gpus_per_node * (plan.memory[name] + IMPORTS_GIB)


def submitted(script: Path) -> str:
    """The number of the job that Slurm makes of a script. Raises ConfigError where it refuses."""
    words = ["sbatch", "--parsable", str(script)]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    if asked.returncode:
        said = " ".join(asked.stderr.removeprefix("sbatch: error:").split())
        raise ConfigError("launcher", "slurm", f"is refused: {said}", f"see {script}")
    return asked.stdout.strip().split(";")[0]


def needs_of(folder: RunFolder) -> str:
    """What a folder's job asks of Slurm, without what is its own."""
    lines = (folder.path / "job.sh").read_text().splitlines()
    own = ("#SBATCH --job-name=", "#SBATCH --output=")
    return "\n".join(x for x in lines if x.startswith("#SBATCH ") and not x.startswith(own))


def array_script(needs: str, script: Path, num_jobs: int) -> str:
    """The batch script of an array; each of its jobs does what the folder's own would."""
    folders = shlex.quote(str(script.with_suffix(".txt")))
    return f"""#!/bin/bash
{needs}
#SBATCH --job-name={script.parent.parent.name}
#SBATCH --array=0-{num_jobs - 1}
#SBATCH --output={script.with_suffix("")}_%a.log
run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {folders})
exec >> "$run/logs/slurm_${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID.log" 2>&1
exec bash "$run/job.sh"
"""


def job_of(folder: RunFolder) -> str | None:
    """The last job that was queued for a folder."""
    note = folder.path / "slurm.json"
    return str(json.loads(note.read_text())["job"]) if note.exists() else None


def option_of(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"


def code_of(folder: RunFolder) -> Path:
    return folder.path / "code"


def freeze_code(path: Path) -> None:
    """Copy what the job will run, so that an edit while it waits changes nothing."""
    shutil.rmtree(path, ignore_errors=True)
    root = Path(__file__).resolve().parent.parent
    unread = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(root / package, path / package, ignore=unread)


def state_of(job: str) -> str | None:
    """A job's state in Slurm's words; None where it is forgotten, UNKNOWN where nobody answers."""
    words = ["squeue", "--noheader", "--states=all", "--jobs", job, "--format", "%T"]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return "UNKNOWN"
    return asked.stdout.strip() or None


def follow(job: str, watch: Callable[[], None]) -> None:
    """Show a job's run until the job has left the queue."""
    while state_of(job) in IS_LIVE:
        watch()
        time.sleep(POLL_SECONDS)
    watch()
