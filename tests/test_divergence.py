"""Numbers that go wrong in real training: skipped on all ranks, gone back from, or the end."""

import itertools
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

from llmtrain.data.order import step_sequences
from llmtrain.data.sequences import open_sequences
from llmtrain.data.shards import prepare
from llmtrain.folder import RunFolder
from llmtrain.metrics import read_records
from tests.conftest import SMALL, Command, wait_until
from tests.finished_models import ANSWERS, QUESTIONS, Models
from tests.test_compose import compose_config
from tests.test_run import is_gone, learned_records, steps_of
from tests.test_train import RATE, Bench

STEPS = ["train.max_steps=4", "train.micro_batch=1", "hardware=cpux2"]
RARE = "§"
BAD_STEP = 13
TRAINING = [
    "model=pretrained",
    "train.precision=fp32",
    "train.seq_len=32",
    "train.global_batch=4",
    "train.max_steps=24",
    "train.log_every=1",
    "train.eval_every=10",
    "train.eval_batches=2",
    "checkpoint.every=5",
    "optimizer.lr=1e-3",
    "hardware=cpux2",
    "zero.stage=2",
    "on_divergence.max_skipped_steps=1",
]


def ways() -> dict[str, list[str]]:
    """Every stage and precision that a CPU trains with, and an optimizer that mixes matrices."""
    adamw = ["optimizer=adamw", "train.grad_clip=1.0"]
    found = {
        f"{precision}_{stage}": [f"train.precision={precision}", f"zero.stage={stage}", *adamw]
        for precision, stage in itertools.product(("fp32", "bf16"), range(4))
    }
    found["pure"] = ["train.precision=bf16_pure", "zero.stage=0", *adamw]
    return found | {
        f"muon_{stage}": ["optimizer=muon", f"zero.stage={stage}"] for stage in range(4)
    }


def test_a_step_that_goes_wrong_on_one_rank_changes_nothing_on_any(command: Command) -> None:
    bench, names = Bench(command), []
    for name, words in ways().items():
        bench.add(name, "skipped_step", *SMALL, *RATE[:1], *STEPS, *words, wrong=("nan", "0"))
        names.append(name)
    for name in ("fp32_0", "bf16_2"):  # a loss that is infinite, and a gradient that is not
        words = [*SMALL, *RATE[:1], *STEPS, *ways()[name]]
        bench.add(f"{name}_loss", "skipped_step", *words, wrong=("1", "inf"))
        names.append(f"{name}_loss")
    for name in ("fp32_0", "bf16_3", "muon_1", "muon_3"):  # one weight's, that Muon leaves to Adam
        words = [*SMALL, *RATE[:1], *STEPS, *ways()[name]]
        bench.add(f"{name}_weight", "skipped_step", *words, wrong=("1", "0"), weight=True)
        names.append(f"{name}_weight")
    results: list[dict[str, Any]] = bench.run(2)
    for name, result in zip(names, results, strict=True):
        assert result["same"], name
        assert result["counted"] == [1, 1, 1, 0, 0.0], name
        assert result["learned"], name
        assert result["restored"], name
        assert result["fourth"] == result["again"], name


def trap(command: Command) -> list[str]:
    """A model that cannot read one character, and text that has it once, in step BAD_STEP."""
    path = poisoned_model(command.folder)
    corpus = command.folder / "texts"
    corpus.mkdir()
    drawn = random.Random(0)
    for number in range(8):
        lines = [drawn.choice(QUESTIONS) + " " + drawn.choice(ANSWERS) for _ in range(100)]
        lines[50] += RARE if number == 5 else ""
        (corpus / f"{number}.txt").write_text("\n".join(lines))
    words = ["data=text", f"data.path={corpus}", "data.held_out_every=4", f"model.path={path}"]
    return [*TRAINING, *words, f"seed={seed_of(command, words)}"]


def poisoned_model(folder: Path) -> Path:
    """A Llama with NaN in the embedding of the first byte of the rare character."""
    import torch
    from safetensors.torch import load_file, save_file

    whole = Models(folder).llama
    path = folder / "poisoned"
    shutil.copytree(whole, path)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][rare_token(path)] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def rare_token(path: Path) -> int:
    from transformers import AutoTokenizer

    return int(AutoTokenizer.from_pretrained(path)(RARE)["input_ids"][0])


def seed_of(command: Command, words: list[str]) -> int:
    """A seed that puts the one sequence with the rare character into step BAD_STEP."""
    config = compose_config(f"cache_root={command.cache}", *TRAINING, *words)
    manifest = prepare(config.data, config.cache, config.model.path)
    sequences = open_sequences(manifest, "train", config.train.seq_len)
    token = rare_token(Path(config.model.path))
    batches = (sequences.batch([index])["input_ids"] for index in range(len(sequences)))
    (bad,) = [index for index, ids_BL in enumerate(batches) if token in ids_BL]
    return next(
        seed
        for seed in range(10_000)
        if bad in step_sequences(seed, BAD_STEP - 1, 4, len(sequences))
    )


def test_a_run_goes_back_and_past_bad_data_also_when_it_is_killed(command: Command) -> None:
    words = trap(command)
    ended = command.run(*words, "name=straight")
    assert ended.returncode == 0, ended.stderr
    said = "Step 13: the loss is not finite; back to step 10, past the data of 3 steps"
    assert said in ended.stdout
    straight = command.only_run()
    assert steps_of(straight) == list(range(1, 25))
    (rollback,) = [r for r in read_records(RunFolder(straight).metrics) if "rollback" in r]
    assert rollback == {
        "step": 11,
        "rollback": 1,
        "reason": "Step 13: the loss is not finite",
        "from_step": 13,
        "to_step": 10,
        "skipped_data_steps": 3,
    }
    status = RunFolder(straight).read_status()
    assert (status["state"], status["skipped_steps"], status["rollbacks"]) == ("done", 1, 1)

    started = command.start(*words, "name=killed")
    wait_until(lambda: len(command.runs()) == 2)
    (killed,) = set(command.runs()) - {straight}
    wait_until(lambda: max(RunFolder(killed).checkpoint_steps(), default=0) >= 15)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate(timeout=60)
    wait_until(is_gone(command.folder), 60)
    assert RunFolder(killed).read_status()["state"] == "running"
    assert command.run(*words, "name=killed").returncode == 0
    assert learned_records(killed) == learned_records(straight)


def test_a_run_that_goes_wrong_again_ends_with_its_last_losses(command: Command) -> None:
    settings = ["on_divergence.max_rollbacks=1", "on_divergence.skip_data=false"]
    ended = command.run(*trap(command), *settings, "hardware=cpux1")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    said = "Step 13: the loss is not finite, and on_divergence.max_rollbacks=1 are used up; lower"
    assert said in ended.stderr
    folder = RunFolder(command.only_run())
    assert folder.read_status()["state"] == "failed"
    account = json.loads(folder.divergence.read_text())
    last = account["last_steps"]
    assert last["step"] == list(range(1, 14))
    assert last["loss"][-1] is None
    assert all(loss > 0 for loss in last["loss"][:-1])
    assert last["was_skipped"] == [False] * 12 + [True]
    assert len(last["grad_norm"]) == len(last["lr"]) == 13
    assert [rollback["to_step"] for rollback in account["rollbacks"]] == [10]
