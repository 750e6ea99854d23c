"""Runs on a real Slurm: what its users rely on when nodes, time and luck run out."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from llmtrain.folder import RunFolder
from tests.conftest import ROOT, SMALL, Command, wait_until
from tests.slurm.cluster import NODES, Cluster, missing, running
from tests.test_run import learned_records, steps_of

pytestmark = pytest.mark.skipif(
    bool(missing()) or os.getuid() != 0,
    reason=f"needs root and {', '.join(missing())}: make test-slurm installs and runs it",
)
WORDS = [*SMALL, "train.log_every=1", "train.eval_every=1000", "optimizer=adamw"]
WORDS += ["train.precision=fp32", "checkpoint.every=20", "hardware=cpux1"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
NEEDS = ("#SBATCH --gpus", "#SBATCH --mem", "#SBATCH --cpus")  # that the cluster has not


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # munge wants its socket's folders open
        with running(Path(place) / "lab") as started:
            yield started


@dataclass
class Lab:
    """The command line on a login node of the cluster."""

    cluster: Cluster
    command: Command

    def run(self, *words: str, launcher: str = "slurm") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command.words("run", f"launcher={launcher}", *WORDS, *words),
            env=self.command.environment | self.cluster.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=self.command.folder,
        )

    def submit(self, *words: str) -> tuple[str, Path]:
        """The job's number and the run's folder."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        (job, folder) = done.stdout.split("Slurm job ")[1].split("\n")[0].split(": ")
        return job, Path(folder)

    def log(self, job: str, folder: Path) -> str:
        path = folder / "logs" / f"slurm_{job}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def lab(cluster: Cluster, command: Command) -> Lab:
    return Lab(cluster, command)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path, corpus: Path) -> Path:
    """A run of 300 steps on this machine alone."""
    command = Command(cache, corpus, tmp_path_factory.mktemp("alone"))
    done = command.run(*WORDS, "train.max_steps=300")
    assert done.returncode == 0, done.stderr
    return command.only_run()


def has_saved(folder: Path, least: int) -> bool:
    return max(RunFolder(folder).checkpoint_steps(), default=0) >= least


def test_two_nodes_learn_what_one_process_does(lab: Lab, undisturbed: Path) -> None:
    where = f"{sys.executable} -c 'import llmtrain; print(llmtrain.__file__)'"
    words = ["hardware.num_nodes=2", "output_root=relative", f'launcher.setup=["{where}"]']
    job, folder = lab.submit("train.max_steps=300", *words)
    folder = lab.command.folder / folder
    assert lab.cluster.wait_for(job, *ENDED) == "COMPLETED", lab.log(job, folder)
    assert RunFolder(folder).read_status()["state"] == "done"
    assert f"{folder}/code/llmtrain/__init__.py" in lab.log(job, folder)
    plan = json.loads(RunFolder(folder).plan.read_text())
    assert (plan["num_nodes"], plan["world_size"]) == (2, 2)
    losses = [record["loss"] for record in learned_records(folder) if "loss" in record]
    alone = [record["loss"] for record in learned_records(undisturbed) if "loss" in record]
    assert losses == pytest.approx(alone, rel=1e-3)


def test_a_job_that_is_preempted_and_requeued_ends_as_an_undisturbed_one(
    lab: Lab, undisturbed: Path
) -> None:
    job, folder = lab.submit("train.max_steps=300")
    wait_until(lambda: has_saved(folder, 20))
    lab.cluster.ask("scancel", "--signal=USR2", job)  # as Slurm does before the time is over
    wait_until(lambda: "Stopped at step" in lab.log(job, folder))
    wait_until(lambda: RunFolder(folder).read_status()["state"] == "running")
    lab.cluster.ask("scontrol", "requeue", job)  # without a word: SIGTERM, then SIGKILL
    assert lab.cluster.wait_for(job, *ENDED) == "COMPLETED", lab.log(job, folder)
    assert lab.log(job, folder).count("MFU") >= 300
    assert learned_records(folder) == learned_records(undisturbed)


def test_a_job_whose_time_is_over_goes_on_in_the_next(lab: Lab) -> None:
    # Slurm may be a minute early, so the signal comes after 30 to 90 s.
    words = ["launcher.time_hours=0.033", "launcher.signal_seconds=30"]
    job, folder = lab.submit("train.max_steps=60000", "checkpoint.every=100000", *words)
    wait_until(lambda: bool(RunFolder(folder).checkpoint_steps()), 600)
    (saved,) = RunFolder(folder).checkpoint_steps()
    wait_until(lambda: max(steps_of(folder), default=0) > saved)
    lab.cluster.ask("scancel", job)
    lab.cluster.wait_for(job, *ENDED)
    steps = steps_of(folder)
    assert steps == list(range(1, steps[-1] + 1))


def test_a_node_that_dies_costs_the_steps_since_the_checkpoint(lab: Lab, undisturbed: Path) -> None:
    job, folder = lab.submit("train.max_steps=300")
    wait_until(lambda: has_saved(folder, 20))
    node = lab.cluster.ask("squeue", "-h", "-j", job, "-o", "%N")
    assert node in NODES
    lab.cluster.kill_node(node)
    lab.cluster.revive_node(node)
    assert lab.cluster.wait_for(job, *ENDED) == "COMPLETED", lab.log(job, folder)
    assert learned_records(folder) == learned_records(undisturbed)


def test_a_crash_shows_as_failed_and_is_not_run_again(lab: Lab) -> None:
    job, folder = lab.submit("train.max_steps=4000")
    wait_until(lambda: has_saved(folder, 20))
    rank = subprocess.run(
        ["pgrep", "-f", f"llmtrain.train {folder}"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    os.kill(int(rank), 9)
    assert lab.cluster.wait_for(job, *ENDED) == "FAILED"
    assert "Rank 0 was killed by signal 9" in lab.log(job, folder)
    assert RunFolder(folder).read_status()["state"] == "failed"


def test_who_waits_sees_the_run_and_its_end(lab: Lab) -> None:
    done = lab.run("train.max_steps=5", "launcher.wait=true")
    assert done.returncode == 0, done.stderr
    assert "step      5/5  loss" in done.stdout and "held-out loss" in done.stdout


def test_a_cancelled_job_stays_away_and_the_same_command_continues_it(lab: Lab) -> None:
    job, folder = lab.submit("train.max_steps=4000")
    wait_until(lambda: has_saved(folder, 20))
    twin = lab.run("train.max_steps=4000")
    assert twin.returncode == 2
    assert f"is running as Slurm job {job}; wait for it, or scancel {job}." in twin.stderr
    lab.cluster.ask("scancel", job)
    assert lab.cluster.wait_for(job, *ENDED) == "CANCELLED"
    time.sleep(1)
    assert lab.cluster.state(job) == "CANCELLED"
    again, _ = lab.submit("train.max_steps=4000")
    wait_until(lambda: "Continuing from step" in lab.log(again, folder))
    lab.cluster.ask("scancel", again)
    lab.cluster.wait_for(again, *ENDED)


def test_the_points_of_a_multirun_that_need_the_same_are_one_array_of_jobs(lab: Lab) -> None:
    done = lab.run("-m", "seed=0,1", "train.max_steps=5")
    assert done.returncode == 0, done.stderr
    jobs = [part.split(":")[0] for part in done.stdout.split("Slurm job ")[1:]]
    array = jobs[0].split("_")[0]
    assert jobs == [f"{array}_0", f"{array}_1"]
    for job in jobs:
        assert lab.cluster.wait_for(job, *ENDED) == "COMPLETED"
    assert all(RunFolder(run).read_status()["state"] == "done" for run in lab.command.runs())
    assert len(lab.command.runs()) == 2
    again = lab.run("-m", "seed=0,1", "train.max_steps=5")
    assert again.returncode == 0 and "Slurm job" not in again.stdout


def test_a_search_keeps_its_trials_in_the_queue_and_hears_how_they_end(lab: Lab) -> None:
    words = ["sweep=search", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "train.max_steps=5"]
    done = lab.run("-m", *words, "sweep.num_trials=3", "sweep.num_parallel=2")
    assert done.returncode == 0, done.stderr
    (record,) = (lab.command.folder / "outputs").glob("*/sweep.json")
    trials = json.loads(record.read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["done"] * 3
    assert all(trial["values"] for trial in trials)
    runs = lab.command.runs()
    assert len(runs) == 3
    # The second was queued before the first was over, and the third was not.
    begins = sorted((run / "config.yaml").stat().st_mtime for run in runs)
    first_end = min((run / "summary.json").stat().st_mtime for run in runs)
    assert begins[1] < first_end < begins[2]


def test_what_would_be_queued_can_be_read_and_what_cannot_work_is_not_queued(lab: Lab) -> None:
    before = lab.cluster.ask("squeue", "-h", "-t", "all")
    words = ["launcher.partition=main", "launcher.options.comment=mine", "launcher.time_hours=2"]
    shown = lab.run("train.max_steps=5", "launcher.submit=false", "hardware.num_nodes=2", *words)
    assert shown.returncode == 0, shown.stderr
    lines = ["nodes=2", "time=120", "partition=main", "comment=mine", "signal=USR2@120"]
    assert all(f"#SBATCH --{line}" in shown.stdout for line in lines)
    assert (
        lab.run("train.max_steps=5", "train.global_batch=7", "train.micro_batch=4").returncode == 2
    )
    refused = lab.run("train.max_steps=5", "launcher.partition=nowhere")
    assert refused.returncode == 2
    assert "launcher=slurm is refused: " in refused.stderr
    assert lab.cluster.ask("squeue", "-h", "-t", "all") == before


def test_the_batch_file_by_hand_goes_back_into_the_queue_and_continues(
    lab: Lab, undisturbed: Path
) -> None:
    text = (ROOT / "deploy" / "job.sbatch").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(NEEDS)]
    script = lab.command.folder / "job.sbatch"
    script.write_text("\n".join(kept) + "\n")
    words = lab.command.words("run", *WORDS, "train.max_steps=300")[3:]
    job = subprocess.run(
        ["sbatch", "--parsable", str(script), *words],
        env=lab.command.environment | lab.cluster.environment | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
        cwd=lab.command.folder,
    ).stdout.strip()
    log = lab.command.folder / f"llmtrain_{job}.log"
    wait_until(lambda: any(has_saved(run, 20) for run in lab.command.runs()))
    lab.cluster.ask("scancel", "--signal=USR2", "--batch", job)  # as before the time is over
    assert lab.cluster.wait_for(job, *ENDED) == "COMPLETED", log.read_text()
    assert "Continuing from step" in log.read_text()
    assert learned_records(lab.command.only_run()) == learned_records(undisturbed)
