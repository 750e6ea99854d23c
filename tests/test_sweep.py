"""A multirun loses nothing, repeats nothing, and a search finds more than chance does."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.compose.points import Dimension, space_of
from llmtrain.errors import ConfigError
from llmtrain.folder import RunFolder, write_text
from llmtrain.hardware import Hardware
from llmtrain.metrics import read_records
from llmtrain.sweep.search import Pruner, Sampler, Search
from llmtrain.trials.record import SweepFolder
from llmtrain.trials.search import SearchTrials, distribution_of
from llmtrain.trials.seats import seats, share
from tests.conftest import SMALL, Command
from tests.test_compose import compose_config

QUICK = [*SMALL, "hardware=cpux1", "zero.stage=0", "train.max_steps=10", "train.eval_every=2"]
TWO = "sweep.objectives={eval_loss: minimize, tokens_per_second: maximize}"
SEARCH = ["sweep=search", "optimizer.lr=tag(log,interval(1e-4,1))"]


def sweep_of(command: Command) -> dict[str, Any]:
    """The record of the one sweep that there is."""
    (path,) = (command.folder / "outputs").glob("*/sweep.json")
    return dict(json.loads(path.read_text()))


def states_of(command: Command) -> list[str]:
    return [trial["state"] for trial in sweep_of(command)["trials"]]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.05)


def losses(path: Path) -> list[Any]:
    """All that a run's records say of what was learned."""
    records = read_records(RunFolder(path).metrics)
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss")) for r in records]


def test_a_grid_over_two_families_and_two_optimizers_leaves_four_folders_and_one_record(
    command: Command,
) -> None:
    words = ["train.seq_len=32", "train.global_batch=4", "train.max_steps=2", "hardware=cpux1"]
    small = ["model.config.num_hidden_layers=1", "model.config.hidden_size=128"]
    grid = ["model=llama_tiny,mamba_tiny", "optimizer=adamw,muon"]
    ended = command.run("-m", *words, *small, *grid, "sweep.num_parallel=2")
    assert ended.returncode == 0, ended.stderr
    assert states_of(command) == ["done"] * 4
    runs = [RunFolder(command.folder / "outputs" / run) for run in command.runs()]
    assert len(runs) == 4
    found = {(each["params"]["model"], each["params"]["optimizer"]) for each in trials(command)}
    assert len(found) == 4
    for trial in trials(command):
        run = RunFolder(command.folder / "outputs" / "sweep" / trial["folder"])
        summary = json.loads(Path(os.path.normpath(run.summary)).read_text())
        assert trial["values"] == [summary["eval_loss"]]


def trials(command: Command) -> list[dict[str, Any]]:
    return list(sweep_of(command)["trials"])


def test_a_trial_learns_bit_for_bit_what_a_command_of_its_own_learns(command: Command) -> None:
    ended = command.run("-m", *QUICK, "seed=1,2")
    assert ended.returncode == 0, ended.stderr
    own = command.run(*QUICK, "seed=2", f"output_root={command.folder / 'alone'}")
    assert own.returncode == 0, own.stderr
    (alone,) = (command.folder / "alone").iterdir()
    assert losses(alone) == losses(command.folder / "outputs" / alone.name)


def test_a_search_that_is_killed_goes_on_and_repeats_nothing(command: Command) -> None:
    words = [*QUICK, *SEARCH, "train.max_steps=30", "sweep.num_trials=6", "sweep.num_parallel=2"]
    words += ["sweep.pruner=none"]
    started = command.start("-m", *words)
    wait_until(lambda: sum(state == "done" for state in known_states(command)) >= 2)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate(timeout=60)
    done = {run.name: run_time(run) for run in command.runs() if is_done(run)}
    ended = command.run("-m", *words)
    assert ended.returncode == 0, ended.stderr
    assert states_of(command) == ["done"] * 6
    assert len(command.runs()) == 6
    assert done == {name: run_time(command.folder / "outputs" / name) for name in done}
    again = command.run("-m", *words)
    assert again.returncode == 0
    assert len(command.runs()) == 6


def known_states(command: Command) -> list[str]:
    return states_of(command) if list((command.folder / "outputs").glob("*/sweep.json")) else []


def is_done(run: Path) -> bool:
    return RunFolder(run).read_status().get("state") == "done"


def run_time(run: Path) -> int:
    return RunFolder(run).summary.stat().st_mtime_ns


def test_ctrl_c_has_all_trials_save_and_the_same_command_continues_them(command: Command) -> None:
    words = [*QUICK, "train.max_steps=3000", "sweep.num_parallel=2", "seed=1,2,3"]
    started = command.start("-m", *words)
    wait_until(lambda: known_states(command)[:2] == ["running"] * 2)
    wait_until(lambda: [steps(run) > 5 for run in command.runs()] == [True] * 2)
    os.kill(started.pid, signal.SIGINT)
    started.communicate(timeout=60)
    assert started.returncode == 75
    assert states_of(command) == ["stopped", "stopped", "waiting"]
    assert all(RunFolder(run).newest_step > 5 for run in command.runs())
    again = command.start("-m", *words)
    wait_until(
        lambda: any(RunFolder(r).read_status()["state"] == "running" for r in command.runs())
    )
    os.kill(again.pid, signal.SIGTERM)
    again.communicate(timeout=60)
    assert again.returncode == 75


def steps(run: Path) -> int:
    return int(RunFolder(run).read_status().get("step", 0))


def test_a_hang_up_reaches_trials_through_the_sweep_and_fails_none(command: Command) -> None:
    words = [*QUICK, *SEARCH, "train.max_steps=3000", "sweep.num_parallel=2"]
    started = command.start("-m", *words)
    wait_until(lambda: known_states(command)[:2] == ["running"] * 2)
    wait_until(lambda: [steps(run) > 5 for run in command.runs()] == [True] * 2)
    os.killpg(started.pid, signal.SIGHUP)
    started.communicate(timeout=60)
    assert started.returncode == 75
    assert states_of(command) == ["stopped"] * 2
    assert all(RunFolder(run).newest_step > 5 for run in command.runs())


def test_a_grid_can_be_rehearsed(command: Command) -> None:
    ended = command.run("-m", *QUICK, "launcher=dry", "seed=1,2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Nothing was started") == 2
    assert states_of(command) == ["done"] * 2


def test_trials_that_fall_behind_are_pruned_and_what_fails_is_recorded(command: Command) -> None:
    lr = "optimizer.lr=1e-2,1e-3,1e-7,1e-8,1e-9,1e30"
    options = ["n_startup_trials=2", "n_warmup_steps=0"]
    ended = command.run(
        "-m",
        *QUICK,
        "sweep=search",
        "sweep.sampler=grid",
        lr,
        "optimizer=adamw",
        "train.max_steps=200",
        "on_divergence.max_skipped_steps=1",
        *(f"sweep.pruner_options.{option}" for option in options),
    )
    assert ended.returncode == 1
    by_lr = {trial["params"]["optimizer.lr"]: trial for trial in trials(command)}
    assert len(by_lr) == 6
    states = [trial["state"] for trial in trials(command)]
    assert "pruned" in states
    assert by_lr[1e30]["state"] == "failed"
    assert by_lr[1e30]["error"]
    pruned = next(trial for trial in trials(command) if trial["state"] == "pruned")
    folder = RunFolder(command.folder / "outputs" / Path(pruned["folder"]).name)
    assert folder.read_status()["state"] == "pruned"


def test_two_objectives_are_searched_without_pruning(command: Command) -> None:
    ended = command.run(
        "-m",
        *QUICK,
        *SEARCH,
        "sweep.num_trials=3",
        TWO,
    )
    assert ended.returncode == 0, ended.stderr
    found = sweep_of(command)
    assert found["objectives"] == {"eval_loss": "minimize", "tokens_per_second": "maximize"}
    assert all(len(trial["values"]) == 2 for trial in found["trials"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["sweep=search"], "varies nothing"),
        (["optimizer.lr=interval(1,2)"], "has no end of points"),
        (["sweep=search", "sweep.num_parallel=1,2"], "is one for all points"),
        ([*SEARCH, "sweep.sampler=grid"], "knows no intervals"),
        ([*SEARCH, "sweep.sampler_options.speed=1"], "is not what TPESampler takes"),
        (
            [*SEARCH, "sweep.objectives={a: minimize, b: maximize}", "sweep.sampler=cmaes"],
            "one objective only",
        ),
        (["seed=1,2", "sweep.objectives={eval_loss: low}"], "is no direction"),
        (["seed=1,2", "optimizer.lrr=1"], "is no key of the config"),
        (["seed=1,2", "resume=outputs/x"], "begins one run at a checkpoint"),
        (["model=llama_tiny,lama_tiny"], "is no choice of model; the nearest is llama_tiny"),
        (["seed=1,2", "hydra/sweeper=basic"], "does not run points of ours"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_one_line(
    words: list[str], reason: str, command: Command
) -> None:
    ended = command.run("-m", *QUICK, *words)
    assert ended.returncode == 2
    assert reason in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert command.runs() == []


def test_a_search_without_m_is_refused(command: Command) -> None:
    ended = command.run(*QUICK, "sweep=lr_and_width")
    assert ended.returncode == 2
    assert "is a search of many runs; add -m." in ended.stderr


def test_an_objective_that_no_summary_has_is_named(command: Command) -> None:
    ended = command.run("-m", *QUICK, "seed=1,2", "sweep.objectives={eval_los: minimize}")
    assert ended.returncode == 1
    assert "the nearest is eval_loss" in ended.stderr


def test_words_of_hydra_make_the_space() -> None:
    space = space_of(
        [
            "model=llama_tiny",
            "optimizer.lr=tag(log, interval(1e-4, 1e-1))",
            "model.config.num_hidden_layers=int(interval(2, 6))",
            "train.global_batch=range(8, 33, step=8)",
            "optimizer=adamw,muon",
            "seed=1,2",
            "seed=3",
        ]
    )
    assert space.fixed == ["model=llama_tiny", "seed=3"]
    lr, layers, batch, optimizer = space.dimensions
    assert lr == Dimension("optimizer.lr", None, 1e-4, 1e-1, is_log=True)
    assert str(distribution_of(lr)).startswith("FloatDistribution(high=0.1, log=True, low=0.0001")
    assert str(distribution_of(layers)).startswith("IntDistribution(high=6, log=False, low=2")
    assert "step=8" in str(distribution_of(batch))
    assert optimizer.choices == ("adamw", "muon")


@pytest.mark.parametrize("sampler", list(Sampler))
def test_every_sampler_and_pruner_asks_for_points_of_the_space(
    sampler: Sampler, tmp_path: Path
) -> None:
    words = ["optimizer.lr=1e-3,1e-2,1e-1"] if sampler is Sampler.grid else [SEARCH[1]]
    words += [] if sampler is Sampler.cmaes else ["schedule=cosine,linear"]
    for pruner in Pruner:
        asked = Search(name="x", num_trials=4, sampler=sampler, pruner=pruner)
        folder = SweepFolder(tmp_path / sampler.value / pruner.value)
        search = SearchTrials(asked, space_of(words), folder)
        seen = set()
        for _ in range(4):
            trial = search.next()
            assert trial is not None and trial.config is not None
            seen.add(trial.config.identity)
            assert 1e-4 <= trial.config.optimizer.lr <= 1
            trial.folder = RunFolder(folder.path / str(trial.number))
            write_text(trial.folder.metrics, '{"step": 1, "eval_loss": 3.0}\n')
            search.is_hopeless(trial)
            trial.state, trial.values = "done", [trial.config.optimizer.lr]
            search.ended(trial)
        assert len(seen) == 4
        assert search.next() is None
        search.close()


def test_processes_share_a_study_and_take_over_only_what_is_left(tmp_path: Path) -> None:
    asked, folder = Search(name="x", num_trials=3), SweepFolder(tmp_path)
    space = space_of([SEARCH[1]])
    first = SearchTrials(asked, space, folder)
    one = first.next()
    assert one is not None
    second = SearchTrials(asked, space, folder)
    two = second.next()
    assert two is not None and two.params != one.params
    assert {trial.number for trial in first.trials} == {0, 1}
    first.close()
    third = SearchTrials(asked, space, folder)
    taken = third.next()
    assert taken is not None and taken.params == one.params
    third.close()
    second.close()


def test_processes_that_begin_together_draw_different_points(tmp_path: Path) -> None:
    asked, folder = Search(name="x", num_trials=8, sampler=Sampler.random), SweepFolder(tmp_path)
    both = [SearchTrials(asked, space_of([SEARCH[1]]), folder) for _ in range(2)]
    drawn = [each.next() for _ in range(4) for each in both]
    assert len({str(trial.params) for trial in drawn if trial is not None}) == 8
    assert [each.next() for each in both] == [None, None]
    for each in both:
        each.close()


def test_a_trial_that_a_process_left_in_the_middle_of_asking_is_completed(tmp_path: Path) -> None:
    asked, folder = Search(name="x", num_trials=2), SweepFolder(tmp_path)
    space = space_of([SEARCH[1], "schedule=cosine,linear"])
    first = SearchTrials(asked, space, folder)
    first.study.ask()  # without parameters, and nobody's
    trial = first.next()
    first.close()
    second = SearchTrials(asked, space, folder)
    found = [second.next(), second.next()]
    assert trial is not None and trial.number == 1
    assert sorted(each.number for each in found if each is not None) == [0, 1]
    assert all(set(each.params) == {"optimizer.lr", "schedule"} for each in found if each)
    second.close()


def test_a_journal_that_ends_in_the_middle_of_a_line_is_mended(tmp_path: Path) -> None:
    asked, folder = Search(name="x", num_trials=3), SweepFolder(tmp_path)
    first = SearchTrials(asked, space_of([SEARCH[1]]), folder)
    one = first.next()
    assert one is not None
    one.state, one.values = "done", [1.0]
    first.ended(one)
    first.close()
    with folder.study.open("ab") as file:
        file.write(b'{"op_code":5,"worker')
    second = SearchTrials(asked, space_of([SEARCH[1]]), folder)
    two = second.next()
    assert two is not None and two.number == 1
    assert [trial.state for trial in second.trials] == ["done", "waiting"]
    second.close()


def test_trials_share_cores_and_gpus_equally() -> None:
    assert [share(list("abcde"), seat, 2) for seat in range(2)] == [("a", "b"), ("c", "d")]
    assert [share(["a"], seat, 3) for seat in range(3)] == [("a",)] * 3
    both = seats(2, Hardware())
    assert len(both) == 2 and all(seat.gpus == () for seat in both)


def test_more_trials_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain import hardware
    from llmtrain.hardware import Gpu
    from llmtrain.trials import seats as module

    gpus = [Gpu(str(n), f"GPU-{n}", "NVIDIA A800", 80.0, 8.0) for n in range(2)]
    monkeypatch.setattr(hardware, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(module, "visible_gpus", lambda: gpus)
    assert [seat.gpus for seat in seats(2, Hardware())] == [("GPU-0",), ("GPU-1",)]
    with pytest.raises(ConfigError, match="more than the 2 GPUs"):
        seats(3, Hardware())


@pytest.mark.parametrize("name", ["lr_ladder", "batch_ladder", "width_transfer", "scaling_law"])
def test_a_recipe_is_a_multirun_without_being_told(name: str, command: Command) -> None:
    ended = command.run(f"experiment={name}", module="plan")
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.strip().splitlines()) >= 8


def test_the_sweep_of_a_run_is_no_part_of_its_identity() -> None:
    assert compose_config("sweep=lr_and_width").identity == compose_config().identity
