"""Where one machine's ranks stand among those of all machines of a run."""

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from llmtrain.errors import ConfigError

FIRST_PORT, NUM_PORTS = 20_000, 10_000  # below those that systems give to clients
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Place:
    """This is machine ``node`` of ``num_nodes``; all meet at ``address`` and ``port``.

    A port of None is any that is free, which the machine alone can choose.
    """

    num_nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int | None = None

    @property
    def is_first(self) -> bool:
        return self.node == 0

    def meeting(self) -> dict[str, str]:
        """What every rank is told of the place to meet, and of the way there."""
        port = self.port if self.port is not None else free_port()
        found = {"MASTER_ADDR": self.address, "MASTER_PORT": str(port)}
        interface = interface_to(self.address) if self.num_nodes > 1 else None
        if interface is not None:
            found |= {name: os.environ.get(name, interface) for name in INTERFACES}
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def interface_to(address: str) -> str | None:
    """The network interface by which this machine reaches another; None if that is not known.

    Libraries take the one that the host's own name points at, which is often none that others see.
    """
    import psutil

    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == own for each in addresses):
            return str(name)
    return None


def place_in_slurm(environment: Mapping[str, str]) -> Place:
    """What Slurm tells a task of itself: one task on each node of a job."""
    names = nodes_of(environment["SLURM_JOB_NODELIST"])
    port = FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS
    return Place(len(names), int(environment["SLURM_NODEID"]), names[0], port)


def nodes_of(names: str) -> list[str]:
    """The hosts in Slurm's short form of a list."""
    asked = ["scontrol", "show", "hostnames", names]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


def place_of(num_nodes: int, node: int, rendezvous: str) -> Place:
    """A place from the command line; raises ConfigError for a rendezvous that is no HOST:PORT."""
    host, _, port = rendezvous.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError("--rendezvous", rendezvous, "is no HOST:PORT", "say node1:29400")
    if not 0 <= node < num_nodes:
        reason = f"is none of the {num_nodes} nodes"
        raise ConfigError("--node-rank", node, reason, f"take 0 to {num_nodes - 1}")
    return Place(num_nodes, node, host.strip("[]"), int(port))
