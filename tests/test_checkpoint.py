"""What a checkpoint promises: it is there wholly or not at all, and what is broken is found out."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint import Retention, Saver, store
from llmtrain.checkpoint.snapshot import Snapshot
from llmtrain.folder import RunFolder
from llmtrain.metrics import read_records
from llmtrain.ranks import Ranks
from tests.conftest import SMALL, Command

QUICK = [*SMALL, "train.log_every=1", "train.eval_every=100", "hardware=cpux1"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def saver(folder: Path, **options: Any) -> Saver:
    """One that saves what one rank has."""
    retention = options.pop("retention", Retention(2, None))
    ranks = Ranks(rank=0, world_size=1, local_rank=0)
    return Saver(RunFolder(folder), ranks, lambda value: value, retention, {}, **options)


def snapshot(step: int, best_step: int | None = None) -> Snapshot:
    tensors = {"master|weight|0": torch.arange(5000.0) + step}
    random = {"cpu": torch.get_rng_state()}
    return Snapshot(step, tensors, random, {"step": step, "best_step": best_step})


def saved(folder: Path, *steps: int, best_step: int | None = None, **options: Any) -> RunFolder:
    """A run folder with checkpoints of some steps."""
    kept = saver(folder, **options)
    for step in steps:
        kept.save(partial(snapshot, step, best_step), 20_000, step)
    kept.settle()
    assert kept.problem is None
    return RunFolder(folder)


def test_a_file_has_what_safetensors_itself_would_write(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(7).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.empty(0), "matrix": torch.rand(3, 4).t()}
    written = store.write_tensors(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert written == store.entry_of(tmp_path / "a.safetensors")


DAMAGES = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 3),
    "flipped": lambda file: flip(file, file.stat().st_size // 2),
    "gone": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
}


def flip(file: Path, place: int) -> None:
    """Turn one bit of a file."""
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["rank_0.safetensors", "rng_0.safetensors", "state.json", "manifest.json"]
)
def test_a_broken_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(
    name: str, damage: str, tmp_path: Path
) -> None:
    folder, said = saved(tmp_path, 10, 20), []
    before = {file: file.read_bytes() for file in folder.checkpoint(10).iterdir()}
    DAMAGES[damage](folder.checkpoint(20) / name)
    assert store.newest_good(folder, None, said.append) == 10
    assert "step 20 is broken" in said[0]
    assert folder.checkpoint_steps() == [10]
    assert (folder.checkpoints / "broken_step_20_1").is_dir()
    assert {file: file.read_bytes() for file in before} == before


def test_what_is_kept_are_the_newest_the_milestones_and_the_best(tmp_path: Path) -> None:
    folder = saved(tmp_path, *range(5, 65, 5), best_step=25, retention=Retention(2, 20))
    assert folder.checkpoint_steps() == [20, 25, 40, 55, 60]


def test_the_mirror_has_what_was_published_and_gives_it_back(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    folder, said = saved(tmp_path / "run", 1, 2, 3, mirror=mirror), []
    assert store.steps_in(mirror) == folder.checkpoint_steps() == [2, 3]
    shutil.rmtree(folder.checkpoints)
    assert store.newest_good(folder, mirror, said.append) == 3
    assert "copied back" in said[0]
    assert store.fault_of(folder.checkpoint(3)) is None


def test_a_disk_without_room_keeps_the_last_checkpoint_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = saver(tmp_path)
    kept.save(lambda: snapshot(1), 20_000, 1)
    kept.settle()
    monkeypatch.setattr(store, "free_bytes", lambda path: 20_000)
    kept.save(lambda: pytest.fail("nothing is copied out"), 20_000, 2)
    assert "no room" in str(kept.problem)
    assert kept.folder.checkpoint_steps() == [1]
    monkeypatch.undo()
    kept.save(lambda: snapshot(3), 20_000, 3)
    kept.settle()
    assert kept.problem is None
    assert kept.folder.checkpoint_steps() == [1, 3]


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_half_written(small_disk: Path) -> None:
    kept = saver(small_disk)
    for step in (1, 2):
        kept.save(partial(snapshot, step), 20_000, step)
    kept.settle()
    large = Snapshot(3, {"master|w|0": torch.zeros(2**20)}, {}, {"step": 3, "best_step": None})
    kept.save(lambda: large, 20_000, 3)  # it was thought to be smaller
    kept.settle()
    assert kept.problem == "No space left on device"
    assert kept.folder.checkpoint_steps() == [1, 2]
    assert not list(kept.folder.checkpoints.glob(".*"))
    kept.save(lambda: snapshot(4), 20_000, 4)
    kept.settle()
    assert kept.problem is None


def test_a_mirror_without_room_is_named_and_the_own_folder_is_thinned_out(
    small_disk: Path, tmp_path: Path
) -> None:
    (small_disk / "filler").write_bytes(bytes(2**20 * 3 - 2**15))
    kept = saver(tmp_path / "run", mirror=small_disk / "mirror")
    for step in range(1, 5):
        kept.save(partial(snapshot, step), 20_000, step)
    kept.settle()
    assert str(kept.problem).startswith(f"its copy at {small_disk / 'mirror'} failed (")
    assert "No space left on device" in str(kept.problem)
    assert kept.folder.checkpoint_steps() == [3, 4]
    assert not list((small_disk / "mirror").glob(".step_*"))


def entries_of(folder: RunFolder, steps: list[int]) -> list[dict[str, Any]]:
    """What the manifests say of the files of tensors."""
    manifests = [json.loads((folder.checkpoint(s) / store.MANIFEST).read_text()) for s in steps]
    return [{n: e for n, e in m["files"].items() if n != "state.json"} for m in manifests]


def test_written_behind_or_waited_for_it_is_the_same_checkpoint(command: Command) -> None:
    words = [*QUICK, "train.max_steps=6", "checkpoint.every=2", "checkpoint.keep=3"]
    for value in ("true", "false"):
        done = command.run(*words, f"checkpoint.asynchronous={value}", f"name=saved_{value}")
        assert done.returncode == 0, done.stderr
    one, other = map(RunFolder, command.runs())
    assert one.checkpoint_steps() == [2, 4, 6]
    assert entries_of(one, [2, 4, 6]) == entries_of(other, [2, 4, 6])


def losses(folder: RunFolder) -> list[tuple[int, float]]:
    records = read_records(folder.metrics)
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def test_a_branch_begins_at_an_older_step_or_at_another_run(command: Command) -> None:
    words = [*QUICK, "checkpoint.every=5", "checkpoint.keep=9", "train.max_steps=15"]
    assert command.run(*words).returncode == 0
    parent = RunFolder(command.only_run())
    again = command.run(*words, "resume=5")
    assert again.returncode == 0, again.stderr
    assert f"from step 5: {parent.path}-from_5" in again.stdout
    branch = RunFolder(Path(f"{parent.path}-from_5"))
    assert json.loads(branch.parent.read_text()) == {"run": str(parent.path), "step": 5}
    assert losses(branch) == losses(parent)
    slower = command.run(*words, "optimizer.lr=0.001", f"resume={parent.checkpoint(10)}")
    assert slower.returncode == 0, slower.stderr
    (other,) = (RunFolder(path) for path in command.runs() if path.name.endswith("_10"))
    assert losses(other)[:10] == losses(parent)[:10]
    assert losses(other)[-1] != losses(parent)[-1]


def test_a_branch_that_cannot_begin_is_refused(command: Command) -> None:
    words = [*QUICK, "train.max_steps=4"]
    assert command.run(*words).returncode == 0
    folder = command.only_run()
    refusals = {
        "resume=1": "resume=1 is no checkpoint of this run; kept are: 3, 4.",
        f"resume={folder}/final": "is a model without training state; to start from its weights",
        f"resume={folder}/logs": "holds no checkpoint; give auto, never, a step",
    }
    for word, said in refusals.items():
        refused = command.run(*words, word)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert said in refused.stderr
    wider = command.run(*words, "model.config.hidden_size=128", f"resume={folder}")
    assert wider.returncode == 2
    assert "parameters, and this run" in wider.stderr
