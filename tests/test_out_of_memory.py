"""Memory that ends: early with a plan of smaller micro-batches, later with what grew."""

import io
import json
import os
import resource
import subprocess

from rich.console import Console

from llmtrain.display import show_growth
from llmtrain.folder import RunFolder, write_text
from llmtrain.plan import Plan, make_plan
from tests.conftest import SMALL, Command
from tests.test_compose import compose_config
from tests.test_run import learned_records, steps_of

# 8 sequences of 512 tokens keep 256 MiB of each of a layer's wide activations, of which there are
# half a dozen: far more than a rank may have below, where half of them fit with room to spare.
WIDE = [
    "model.config.vocab_size=512",
    "model.config.intermediate_size=16384",
    "model.config.hidden_size=64",
    "model.config.head_dim=32",
    "model.config.num_hidden_layers=1",
    "train.seq_len=512",
    "train.max_steps=2",
    "train.log_every=1",
    "train.eval_batches=1",
    "data.held_out_every=12",
    "train.precision=fp32",
    "train.activation_checkpointing=none",
    "optimizer=adamw",
]


def limited(
    command: Command, limit_mib: int, *overrides: str
) -> "subprocess.CompletedProcess[str]":
    """Run the command on two cores, with so much memory for each of its processes."""

    def limit() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        resource.setrlimit(resource.RLIMIT_DATA, (limit_mib * 2**20,) * 2)

    return subprocess.run(
        command.words("run", *overrides),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=command.folder,
        env=command.environment,
        preexec_fn=limit,
    )


def test_memory_that_ends_early_halves_the_micro_batch_on_all_ranks(command: Command) -> None:
    words = [*WIDE, "hardware=cpux2", "train.global_batch=16", "zero.stage=0"]
    ended = limited(command, 2700, *words, "train.micro_batch=8", "name=short")
    assert ended.returncode == 0, ended.stderr
    assert "Out of memory with micro_batch 8: again from step 0 with 4" in ended.stdout
    folder = RunFolder(command.only_run())
    plans = [Plan.load(folder.path / name) for name in ("plan.json", "plan-2.json")]
    assert [(plan.micro_batch, plan.grad_accum) for plan in plans] == [(8, 1), (4, 2)]
    assert plans[1].reasons["micro_batch"] == "memory ran out with micro_batch 8"
    assert folder.read_status()["state"] == "done"
    assert steps_of(folder.path) == [1, 2]

    enough = f"train.micro_batch={Plan.load(folder.plan).micro_batch}"
    assert command.run(*words, enough, "name=straight").returncode == 0
    (straight,) = set(command.runs()) - {folder.path}
    # Held-out sums may differ in their last bit between processes; what was learned may not.
    learned = [
        [r for r in learned_records(path) if "loss" in r] for path in (folder.path, straight)
    ]
    assert learned[0] == learned[1]


def test_memory_that_ends_with_one_sequence_at_a_time_ends_the_run(command: Command) -> None:
    wider = ["model.config.intermediate_size=131072", "train.global_batch=1"]
    restarts = "launcher.max_restarts=3"
    ended = limited(command, 2000, *WIDE, *wider, "hardware=cpux1", restarts)
    assert ended.returncode == 1
    assert "Restart 1 of 3 from step 0." in ended.stdout
    assert "Not started again: twice the ranks came to step 0, no further." in ended.stdout
    assert "Restart 2" not in ended.stdout
    assert "Training failed: out of memory after 0 steps: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "planned" in ended.stdout
    assert len(list(command.only_run().glob("plan*.json"))) == 1


def test_what_grew_stands_beside_what_was_planned(command: Command) -> None:
    plan = make_plan(compose_config(*SMALL, "hardware=cpux1", f"cache_root={command.cache}"))
    folder, text = RunFolder(command.folder), io.StringIO()
    records = [{"step": step, "loss": 1.0, "memory_gib": step / 100} for step in range(1, 101)]
    write_text(folder.metrics, "".join(json.dumps(record) + "\n" for record in records))
    show_growth(folder, plan, Console(file=text, width=80))
    assert f"{plan.memory['device_peak_gib']:.2f}" in text.getvalue()
    rows = [line for line in text.getvalue().splitlines() if "up to step" in line]
    assert len(rows) == 5
    assert "up to step 1 " in rows[0]
    assert "up to step 100" in rows[-1]
    assert "1.00" in rows[-1]
