"""MLflow, at a server, in a database or in the run folder."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from llmtrain.schema import unlearned
from llmtrain.tracker.base import Line, Record, Subject, Tracker, flat, numbers

STATES = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
MOST_PARAMS = 100  # of one request
MOST_METRICS = 1000
MOST_LETTERS = 500  # of a parameter, at servers of any age
MOST_LETTERS_OF_TAG = 5000


@dataclass
class MLflow(Tracker):
    """A run of ``experiment`` at ``tracking_uri``.

    null: at MLFLOW_TRACKING_URI, or where that is not set in a database in the run folder.
    """

    kind: str = "mlflow"
    tracking_uri: str | None = unlearned()
    experiment: str = unlearned("???")
    group: str | None = unlearned()

    package: ClassVar[str] = "mlflow"

    def join(self, sweep: str) -> None:
        self.group = self.group or sweep

    def open(self, subject: Subject) -> Line:
        from mlflow import MlflowClient

        own = f"sqlite:///{subject.folder.absolute()}/mlflow.db"
        client = MlflowClient(self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own)
        if subject.id is not None:
            client.update_run(subject.id, status="RUNNING")
            return MLflowLine(client, subject.id)
        tags = {} if self.group is None else {"group": self.group}
        run = client.create_run(self.experiment_id(client), run_name=subject.name, tags=tags)
        line = MLflowLine(client, run.info.run_id)
        line.describe({**subject.config, "plan": subject.plan})
        return line

    def experiment_id(self, client: Any) -> str:
        """The experiment's, which is made where there is none."""
        found = client.get_experiment_by_name(self.experiment)
        return str(found.experiment_id if found else client.create_experiment(self.experiment))


class MLflowLine:
    """One run of MLflow's."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client = client
        self.id = run_id

    def describe(self, values: dict[str, Any]) -> None:
        """Config and plan as parameters, which can be said once."""
        from mlflow.entities import Param

        pairs = (Param(key, str(value)[:MOST_LETTERS]) for key, value in flat(values))
        while some := list(islice(pairs, MOST_PARAMS)):
            self.client.log_batch(self.id, params=some)

    def log(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = (
            Metric(name, value, now, record["step"])
            for record in records
            for name, value in numbers(record).items()
            if name != "step"
        )
        while some := list(islice(metrics, MOST_METRICS)):
            self.client.log_batch(self.id, metrics=some)

    def sample(self, step: int, text: str) -> None:
        shown = f"step {step}\n{text}"[:MOST_LETTERS_OF_TAG]
        self.client.set_tag(self.id, "sample", shown)

    def close(self, state: str, summary: Record) -> None:
        figures = {f"summary/{name}": value for name, value in numbers(summary).items()}
        if figures:
            self.log([{"step": summary["num_steps"], **figures}])
        self.client.set_terminated(self.id, STATES[state])
