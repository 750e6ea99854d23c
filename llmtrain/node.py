"""Trains a filled run folder as one of its machines.

    python -m llmtrain.node outputs/<run> --num-nodes 2 --node-rank 1 --rendezvous node1:29400

on each of them, with the same folder in sight of all. Below srun Slurm says the rest.
"""

import argparse
import os
import signal
import sys

from launchers.place import Place, place_in_slurm, place_of
from llmtrain.errors import DONE, STOPPED, ConfigError, TrainingError
from llmtrain.folder import RunFolder


def main(words: list[str]) -> int:
    """The exit code of the run, as far as this machine knows of it."""
    for number in (signal.SIGTERM, signal.SIGUSR2):  # as early as can be: a job may be asked to go
        signal.signal(number, lambda *_: sys.exit(STOPPED))
    from llmtrain.compose import report
    from llmtrain.on_finish import Afterwards
    from llmtrain.training import Training

    assert __doc__ is not None
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("llmtrain.node", description=__doc__, formatter_class=usage)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--rendezvous", help="HOST:PORT of the first machine, with a free port")
    options = parser.parse_args(words)
    try:
        Training.of(RunFolder(options.run), place(options)).train_filled(Afterwards())
    except (ConfigError, TrainingError) as error:
        return report(error)
    return DONE


def place(options: argparse.Namespace) -> Place:
    """From the command line, from Slurm, or this machine alone."""
    if options.rendezvous is not None:
        return place_of(options.num_nodes, options.node_rank, options.rendezvous)
    if "SLURM_NODEID" in os.environ:
        return place_in_slurm(os.environ)
    if options.num_nodes > 1:
        reason, remedy = "is missing", "say where the first machine is: --rendezvous node1:29400"
        raise ConfigError("--rendezvous", None, reason, remedy)
    return Place()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
