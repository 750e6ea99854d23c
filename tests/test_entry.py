"""`llmtrain COMMAND` is `python -m llmtrain.COMMAND`, and completes in bash."""

import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest

from llmtrain.__main__ import COMMANDS
from tests.conftest import ROOT, SMALL, Command, wait_until
from tests.test_run import steps_of

BASH = shutil.which("bash")


def call(*words: str, **options: str) -> "subprocess.CompletedProcess[str]":
    """A command of the installed package."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=environment
    )


def test_help_says_a_line_about_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['llmtrain', '--help']; from llmtrain.__main__ import main; main();"
        "sys.exit(len({'hydra', 'omegaconf', 'rich', 'torch', 'yaml'} & set(sys.modules)))"
    )
    said = call("-c", script)
    assert said.returncode == 0
    for name, what in COMMANDS.items():
        assert f"  {name} " in said.stdout and what in said.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_that_python_can_run(name: str) -> None:
    spec = find_spec(f"llmtrain.{name}")
    assert spec is not None
    if spec.submodule_search_locations is not None:
        assert find_spec(f"llmtrain.{name}.__main__") is not None


def test_an_unknown_command_is_refused_with_the_nearest() -> None:
    said = call("-m", "llmtrain", "staus")
    assert said.returncode == 2
    assert said.stderr == "command=staus does not exist; the nearest is status.\n"
    assert call("-m", "llmtrain").returncode == 2


@pytest.mark.parametrize(
    "words", ["status /nowhere", "plan modle=x", "list nothing", "run --help", "data"]
)
def test_a_command_says_and_returns_what_its_module_does(words: str) -> None:
    name, *rest = words.split()
    by_name, by_module = call("-m", "llmtrain", name, *rest), call("-m", f"llmtrain.{name}", *rest)
    assert by_name.returncode == by_module.returncode
    assert by_name.stderr == by_module.stderr
    assert by_name.stdout == by_module.stdout


def test_a_multirun_that_is_stopped_leaves_with_75_and_the_same_command_continues(
    command: Command,
) -> None:
    words = command.words(
        "run", *SMALL, "-m", "seed=0,1", "train.max_steps=20", "train.log_every=1"
    )
    words[words.index("llmtrain.run")] = "llmtrain"
    words.insert(words.index("llmtrain") + 1, "run")
    where = {"cwd": command.folder, "env": command.environment}
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, **where)
    wait_until(lambda: any(steps_of(run) for run in command.runs()))
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 75
    second = subprocess.run(words, capture_output=True, text=True, check=False, **where)
    assert second.returncode == 0, second.stderr
    assert [steps_of(run) for run in command.runs()] == [list(range(1, 21))] * 2


def completed(line: str) -> list[str]:
    """What bash offers for a line, by its own rules for words."""
    words = line.replace("=", " = ").split(" ")
    script = f"""
        llmtrain() {{ {sys.executable} -m llmtrain "$@"; }}
        eval "$(llmtrain completion)"
        COMP_LINE={line!r} COMP_POINT={len(line)}
        COMP_WORDS=({" ".join(repr(word) for word in words)}) COMP_CWORD={len(words) - 1}
        _llmtrain llmtrain
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [str(BASH), "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert not said.stderr
    return said.stdout.split()


@pytest.mark.skipif(BASH is None, reason="bash is not here")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("llmtrain ", sorted(COMMANDS)),
        ("llmtrain re", ["report"]),
        ("llmtrain run optimizer=ad", ["adafactor", "adamw", "adamw8bit"]),
        ("llmtrain run model=llama_tiny train.max_s", ["train.max_steps="]),
        ("llmtrain plan hardw", ["hardware.", "hardware="]),
        ("llmtrain run sche", ["schedule.", "schedule="]),
        ("llmtrain generate out", []),
    ],
)
def test_bash_completes_commands_choices_and_keys(line: str, offered: list[str]) -> None:
    assert sorted(set(completed(line))) == sorted(offered)
