"""Training on real ranks: the same curve however it is spread, and models that open elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launchers.local import shared_environment
from llmtrain.data.shards import prepare
from llmtrain.folder import RunFolder
from llmtrain.job import Job
from llmtrain.plan import Plan, make_plan
from tests.conftest import ROOT, SMALL, Command
from tests.test_compose import compose_config

FAMILIES = {
    "llama_tiny": SMALL,
    "moe_tiny": [
        "model.config.vocab_size=512",
        "model.config.hidden_size=64",
        "model.config.intermediate_size=64",
        "model.config.num_hidden_layers=2",
    ],
    "mamba_tiny": ["model.config.vocab_size=512", "model.config.hidden_size=64"],
    "mamba2_tiny": ["model.config.vocab_size=512", "model.config.hidden_size=64"],
    "hybrid_tiny": ["model.config.vocab_size=512", "model.config.hidden_size=64"],
}
RATE = ["optimizer.lr=5e-3", "train.max_steps=20"]
LENGTHS = ["train.seq_len=32", "train.global_batch=4"]


class Bench:
    """Fills run folders and trains them together on one or two ranks."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.tasks: list[dict[str, Any]] = []

    def add(self, name: str, do: str, *overrides: str, **more: Any) -> None:
        """A task on a run of its own, over the corpus if it brings no data."""
        command = self.command
        text = ["data=text", f"data.path={command.corpus}", "data.held_out_every=4"]
        brings_data = any(word.startswith("data=") for word in overrides)
        roots = [f"cache_root={command.cache}", f"output_root={command.folder}"]
        words = [f"name={name}", *roots, *([] if brings_data else text), *overrides]
        config = compose_config(*words)
        manifest = prepare(config.data, config.cache, config.model.path)
        job = Job(config, make_plan(config, manifest), manifest)
        job.fill_folder()
        self.tasks.append({"do": do, "folder": str(job.folder.path), **more})

    def run(self, num_ranks: int) -> list[Any]:
        """The results of all tasks, in order."""
        path, results = self.command.folder / "job.json", self.command.folder / "results.json"
        path.write_text(json.dumps({"tasks": self.tasks, "results": str(results)}))
        shared = os.environ | shared_environment(threads=1) | {"DS_ACCELERATOR": "cpu"}
        shared |= {"TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": str(ROOT)}
        shared |= {"PYTHONFAULTHANDLER": "1"}  # where each was, if they hang
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.on_ranks", str(path)],
                env=shared
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
            )
            for rank in range(num_ranks)
        ]
        said = said_by(ranks, seconds=1200)  # the first offload to a disk compiles for minutes
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)
        found: list[Any] = json.loads(results.read_text())
        return found


def said_by(ranks: "list[subprocess.Popen[str]]", seconds: float) -> list[str]:
    """What ranks print to their end; those that hang end with their stacks."""
    end = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        if any(rank.poll() for rank in ranks):
            end = min(end, time.monotonic() + 10)  # the others wait for one that has failed
        for rank in ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.communicate(timeout=0.2)
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGABRT)
    return [rank.communicate(timeout=30)[0] for rank in ranks]


@pytest.fixture
def bench(command: Command) -> Bench:
    return Bench(command)


def test_the_loss_curve_is_the_same_at_every_stage_and_number_of_ranks(
    bench: Bench, command: Command
) -> None:
    curves = {}
    for num_ranks in (1, 2):
        bench.tasks = []
        for stage in range(4):
            spread = [f"hardware=cpux{num_ranks}", f"zero.stage={stage}", "train.precision=fp32"]
            name = f"stage{stage}ranks{num_ranks}"
            bench.add(name, "curve", *SMALL, *spread, "optimizer=adamw", *RATE)
        for stage, losses in enumerate(bench.run(num_ranks)):
            curves[num_ranks, stage] = losses
    reference = curves[1, 0]
    assert reference[-1] < reference[0] - 0.3
    for spread, losses in curves.items():
        assert losses == pytest.approx(reference, rel=1e-3), spread


@pytest.mark.parametrize(("num_ranks", "stage", "precision"), [(1, 0, "fp32"), (2, 2, "bf16")])
def test_a_step_holds_the_bytes_that_were_planned(
    num_ranks: int, stage: int, precision: str, bench: Bench
) -> None:
    spread = [f"hardware=cpux{num_ranks}", f"zero.stage={stage}", f"train.precision={precision}"]
    shape = ["train.seq_len=128", "train.global_batch=16", "train.micro_batch=4"]
    shape += ["checkpoint.asynchronous=false"]  # none is saved here
    bench.add("held", "live_bytes", *spread, *shape, "optimizer=adamw", "train.max_steps=5")
    (num_bytes,) = bench.run(num_ranks)
    plan = Plan.load(RunFolder(Path(bench.tasks[0]["folder"])).plan)
    assert plan.memory["live_gib"] * 2**30 == pytest.approx(num_bytes, rel=0.03)


def test_bf16_learns_alike_at_every_stage(bench: Bench) -> None:
    for stage in range(4):
        words = [*SMALL, "hardware=cpux1", "train.precision=bf16", f"zero.stage={stage}"]
        bench.add(f"stage{stage}", "curve", *words, "optimizer=adamw", "train.micro_batch=4", *RATE)
    reference, *others = bench.run(1)
    for losses in others:
        assert losses == pytest.approx(reference, rel=5e-3)


def test_accumulation_and_recomputation_change_memory_and_not_the_result(bench: Bench) -> None:
    words = [*SMALL, "hardware=cpux1", "train.precision=fp32", "train.max_steps=8"]
    bench.add("whole", "curve", *words)
    bench.add("accumulated", "curve", *words, "train.micro_batch=1")
    bench.add("recomputed", "curve", *words, "train.activation_checkpointing=full")
    bench.add("halfway", "curve", *words, "train.activation_checkpointing=2")
    whole, *others = bench.run(1)
    for losses in others:
        assert losses == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_family_trains_and_its_final_model_has_the_trainers_logits(
    bench: Bench, num_ranks: int
) -> None:
    for name, overrides in FAMILIES.items():
        stage = f"zero.stage={3 if num_ranks == 2 else 0}"
        words = [f"model={name}", *overrides, *LENGTHS, f"hardware=cpux{num_ranks}", stage]
        bench.add(name, "final_logits", *words, "train.max_steps=10", "train.precision=bf16")
    for task, result in zip(bench.tasks, bench.run(num_ranks), strict=True):
        assert result["losses"][-1] < result["losses"][0], task
        assert opened_logits(Path(task["folder"]) / "final") == pytest.approx(
            result["logits"], abs=2e-2
        )


def opened_logits(path: Path) -> list[float]:
    """The logits of the fixed text, by transformers alone."""
    script = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1]).decode([5, 6])\n"
        "tokens_BL = torch.arange(2, 18)[None]\n"
        "print(json.dumps(model(tokens_BL).logits[0, -1].float().tolist()))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    logits: list[float] = json.loads(ended.stdout.splitlines()[-1])
    return logits


def test_a_finished_model_can_be_trained_further(bench: Bench, command: Command) -> None:
    bench.add("first", "final_logits", *SMALL, "hardware=cpux1", "train.max_steps=10")
    first = bench.run(1)[0]
    final = Path(bench.tasks[0]["folder"]) / "final"
    bench.tasks = []
    again = ["model=pretrained", f"model.path={final}", *LENGTHS, "hardware=cpux1"]
    bench.add("second", "final_logits", *again, "train.max_steps=6", "optimizer.lr=1e-3")
    second = bench.run(1)[0]
    assert second["losses"][0] < first["losses"][0] - 0.3


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_checkpoint_continues_to_the_bit_at_every_stage(bench: Bench, num_ranks: int) -> None:
    cases = []
    for stage, precision in [(0, "bf16"), (0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]:
        for do in ("curve", "save_and_continue"):
            words = [*SMALL, f"hardware=cpux{num_ranks}", f"zero.stage={stage}"]
            words += [f"train.precision={precision}", "train.max_steps=6", "optimizer=adamw"]
            name = f"{do}{stage}{precision}"
            bench.add(name, do, *words)
            cases.append(name)
    results = bench.run(num_ranks)
    for straight, resumed, name in zip(results[::2], results[1::2], cases[::2], strict=True):
        assert straight == resumed, name


def test_every_family_and_accumulation_continue_to_the_bit(bench: Bench) -> None:
    cases = [[f"model={model}", *sizes] for model, sizes in FAMILIES.items()]
    cases += [[*SMALL, "train.micro_batch=1"], [*SMALL, "adapter=lora"]]
    for number, words in enumerate(cases):
        for do in ("curve", "save_and_continue"):
            fixed = [*LENGTHS, "hardware=cpux1", "optimizer=adamw", "train.max_steps=4"]
            bench.add(f"{do}{number}", do, *words, *fixed)
    results = bench.run(1)
    for straight, resumed, words in zip(results[::2], results[1::2], cases, strict=True):
        assert straight == resumed, words


LEGS = ((2, 2), (1, 3), (2, 3))  # ranks, steps


def test_a_checkpoint_moves_from_two_ranks_to_one_and_back_at_every_stage(bench: Bench) -> None:
    cases = [(optimizer, stage) for optimizer in ("adamw", "muon") for stage in range(4)]
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for ranks, steps in LEGS:
        bench.tasks = []
        for optimizer, stage in cases:
            words = [f"optimizer={optimizer}", f"zero.stage={stage}", *moving(ranks)]
            bench.add(f"moved_{optimizer}{stage}", "leg", *words, steps=steps)
        for case, losses in zip(cases, bench.run(ranks), strict=True):
            found[case] += losses
    bench.tasks = []
    for optimizer in ("adamw", "muon"):
        bench.add(f"still_{optimizer}", "curve", f"optimizer={optimizer}", *moving(2))
    still = dict(zip(("adamw", "muon"), bench.run(2), strict=True))
    for (optimizer, stage), losses in found.items():
        assert losses == pytest.approx(still[optimizer], rel=1e-3), (optimizer, stage)


def test_a_checkpoint_moves_from_stage_to_stage(bench: Bench) -> None:
    """Also where a rank holds parts of matrices that the optimizer needs whole."""
    places = [(1, 0), (2, 2), (2, 3), (1, 1), (2, 0)]
    found: dict[str, list[float]] = {"adamw": [], "muon": []}
    for number, (ranks, stage) in enumerate(places):
        bench.tasks = []
        for optimizer in found:
            words = [f"optimizer={optimizer}", f"zero.stage={stage}", *moving(ranks)]
            steps = 8 - number if number == len(places) - 1 else 1
            bench.add(f"moved_{optimizer}", "leg", *words, steps=steps)
        for optimizer, losses in zip(found, bench.run(ranks), strict=True):
            found[optimizer] += losses
    bench.tasks = []
    for optimizer in found:
        bench.add(f"still_{optimizer}", "curve", f"optimizer={optimizer}", *moving(2))
    for optimizer, losses in zip(found, bench.run(2), strict=True):
        assert found[optimizer] == pytest.approx(losses, rel=1e-3), optimizer


def moving(ranks: int) -> list[str]:
    """A run of eight steps in single precision, at stage 3 with nothing kept whole."""
    whole = "+zero.extra.zero_optimization.stage3_param_persistence_threshold=0"
    words = [f"hardware=cpux{ranks}", "train.precision=fp32", "train.max_steps=8", whole]
    return [*SMALL, *words, "train.grad_clip=0"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_norm_is_the_gradients_at_every_stage_also_where_muon_replaces_it(
    bench: Bench, ranks: int
) -> None:
    optimizers = ("adamw", "muon")
    for optimizer in optimizers:
        for stage in range(4):
            words = [f"optimizer={optimizer}", f"zero.stage={stage}", "train.micro_batch=1"]
            few = [*moving(ranks), "train.max_steps=3"]
            bench.add(f"norm_{optimizer}{stage}", "gradient_norms", *few, *words)
    results = bench.run(ranks)
    for number in range(2):
        first, *others = results[4 * number : 4 * number + 4]
        for stage, norms in enumerate(others, start=1):
            assert norms == pytest.approx(first, rel=1e-3), (optimizers[number], stage)
        assert first[0] == pytest.approx(results[0][0], rel=1e-3)  # nothing was learned before


def test_the_token_that_ends_documents_is_learned(bench: Bench) -> None:
    words = [
        *SMALL,
        "hardware=cpux1",
        "train.max_steps=3",
        "model.config.tie_word_embeddings=false",
    ]
    bench.add("ends", "end_of_document", *words)
    assert bench.run(1)[0] > 0


def test_muon_and_adafactor_train_and_continue_to_the_bit(bench: Bench) -> None:
    for optimizer, stage in [("muon", 0), ("muon", 1), ("muon", 3), ("adafactor", 0)]:
        for do in ("curve", "save_and_continue"):
            words = [*SMALL, "hardware=cpux1", f"optimizer={optimizer}", f"zero.stage={stage}"]
            bench.add(f"{optimizer}{stage}{do}", do, *words, "train.max_steps=16")
    results = bench.run(1)
    for straight, resumed in zip(results[::2], results[1::2], strict=True):
        assert straight == resumed
        assert straight[-1] < straight[0]
    assert results[0] == pytest.approx(results[4], rel=1e-2)  # Muon at stage 0 and at stage 3
