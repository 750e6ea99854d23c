"""A real Slurm on this machine, of two nodes, without systemd and with all it has in one folder.

Needs Debian's slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins and munge (`make
test-slurm` installs them where it may).
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve everywhere
SECONDS_TO_START = 120
SBIN = "/usr/sbin"


def missing() -> list[str]:
    """The programs that are not installed."""
    path = f"{os.environ['PATH']}:{SBIN}"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@dataclass
class Cluster:
    """One that runs; its folder has the daemons' configuration, state and logs."""

    folder: Path
    processes: dict[str, "subprocess.Popen[bytes]"]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{SBIN}",
        }

    def ask(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        asked = subprocess.run(
            words, env=os.environ | self.environment, capture_output=True, text=True, check=False
        )
        return asked.stdout.strip()

    def state(self, job: str) -> str:
        return self.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait until a job is in one of some states, and say in which."""
        end = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, f"job {job} is {state}, not {' or '.join(states)}"
            time.sleep(0.1)
        return state

    def start(self, name: str, *words: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                words, stdout=log, stderr=log, env=os.environ | self.environment
            )

    def start_node(self, node: str) -> None:
        self.start(node, f"{SBIN}/slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", node)

    def kill_node(self, node: str) -> None:
        """End a node's daemon and all that ran there, as a loss of power would."""
        import psutil

        daemon = psutil.Process(self.processes[node].pid)
        below = daemon.children(recursive=True)
        below += [each for each in psutil.process_iter() if is_step_of(each, node)]
        for each in {*below, *(child for step in below for child in children_of(step))}:
            with suppress(psutil.Error):
                each.kill()
        daemon.kill()
        self.processes.pop(node).wait()
        self.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def revive_node(self, node: str) -> None:
        self.start_node(node)
        self.ask("scontrol", "update", f"nodename={node}", "state=resume")

    def stop(self) -> None:
        import psutil

        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGKILL)
            process.wait()
        for each in psutil.process_iter():  # steps have parents of their own
            with suppress(psutil.Error):
                if str(self.folder) in " ".join([*each.cmdline(), *each.environ().values()]):
                    each.kill()


def is_step_of(process: "psutil.Process", node: str) -> bool:  # type: ignore[name-defined] # noqa: F821
    import psutil

    with suppress(psutil.Error):
        name = process.name()
        return name.startswith("slurmstepd") and node in process.environ().get(
            "SLURMD_NODENAME", ""
        )
    return False


def children_of(process: "psutil.Process") -> list["psutil.Process"]:  # type: ignore[name-defined] # noqa: F821
    import psutil

    with suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster that is up, and gone afterwards."""
    folder.mkdir(parents=True)
    cluster = Cluster(folder, {})
    first_port = random.randrange(20_000, 30_000)
    (folder / "slurm.conf").write_text(configuration(folder, first_port))
    for name in ("ctl", "d", "pid", "log", "munge"):
        (folder / name).mkdir()
    try:
        start_munge(cluster)
        config = str(folder / "slurm.conf")
        cluster.start("slurmctld", f"{SBIN}/slurmctld", "-D", "-f", config)
        wait(lambda: "is UP" in cluster.ask("timeout", "5", "scontrol", "ping"), folder)
        for node in NODES:
            cluster.start_node(node)
        idle = ["idle"] * len(NODES)
        wait(lambda: cluster.ask("sinfo", "-hN", "-p", "main", "-o", "%T").split() == idle, folder)
        yield cluster
    finally:
        cluster.stop()


def start_munge(cluster: Cluster) -> None:
    place = cluster.folder / "munge"
    place.chmod(0o755)
    (place / "key").write_bytes(os.urandom(128))
    (place / "key").chmod(0o600)
    files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log"}
    files["seed-file"] = "seed"
    words = [f"--{option}={place / name}" for option, name in files.items()]
    cluster.start("munged", f"{SBIN}/munged", "-F", "--num-threads=2", *words)
    wait(lambda: (place / "sock").exists(), cluster.folder)


def wait(condition: Callable[[], bool], folder: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while not condition():
        logs = [log.read_text()[-2000:] for log in folder.glob("*.log")]
        assert time.monotonic() < end, "\n".join(["the cluster does not start", *logs])
        time.sleep(0.1)


def configuration(folder: Path, port: int) -> str:
    """What matters of slurm.conf."""
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + number} "
        f"CPUs={max(4, os.cpu_count() or 1)} RealMemory=16000 State=UNKNOWN"
        for number, node in enumerate(NODES)
    )
    return f"""
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/ctl
SlurmdSpoolDir={folder}/d/%n
SlurmctldPidFile={folder}/pid/slurmctld
SlurmdPidFile={folder}/pid/slurmd-%n
SlurmdLogFile={folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
KillWait=5
MinJobAge=3600
JobRequeue=1
ReturnToService=2
FirstJobId={random.randrange(1000, 60_000)}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
