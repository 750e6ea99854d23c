"""What docs/extending.md tells a user to write works as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from llmtrain.folder import RunFolder
from llmtrain.plan import Plan
from tests.conftest import ROOT, Command
from tests.test_run import learned_records

PAGE = ROOT / "docs" / "extending.md"
FILE = re.compile(r"`([\w/]+[.](?:py|yaml))`:\n\n```(?:python|yaml)\n(.*?)```", re.DOTALL)
SMALL = [
    *("model.config.hidden_size=64", "model.config.num_hidden_layers=2", "train.seq_len=64"),
    *("train.global_batch=4", "train.log_every=1", "train.eval_batches=1", "hardware=cpux1"),
]
FIELDS = "class Sizes:\n    vocab_size: int\n    hidden_size: int\n    num_hidden_layers: int\n"


class Copy:
    """The program with every file of the page in it."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.folder = command.folder / "copy"
        for name in ("llmtrain", "launchers", "hydra_plugins", "conf"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        self.files = dict(FILE.findall(PAGE.read_text(encoding="utf-8")))
        for name, content in self.files.items():
            assert not (self.folder / name).exists(), f"{name} is there already"
            (self.folder / name).write_text(content, encoding="utf-8")

    def python(self, *words: str, code: int = 0) -> str:
        """What a command of ours prints, from this copy; a refusal's line if it has to fail."""
        ended = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=self.command.folder,
            env=self.command.environment | {"PYTHONPATH": str(self.folder)},
        )
        assert ended.returncode == code, ended.stderr
        return ended.stderr if code else ended.stdout

    def run(self, *words: str, module: str = "run", code: int = 0) -> str:
        return self.python(*self.command.words(module, *words)[1:], code=code)


@pytest.fixture
def copy(command: Command) -> Copy:
    return Copy(command)


def test_the_page_has_a_file_for_each_part(copy: Copy) -> None:
    parts = {str(Path(name).parent) for name in copy.files if name.endswith(".py")}
    assert parts == {
        *("llmtrain/architecture", "llmtrain/data/source", "llmtrain/mode", "llmtrain/optimizer")
    }


def test_an_architecture_of_ones_own_is_planned_trained_written_with_and_opened_again(
    copy: Copy,
) -> None:
    own = ["model=mingru_tiny", *SMALL, "train.max_steps=12", "optimizer.lr=3e-3"]
    said = copy.run(*own)
    folder = RunFolder(copy.command.only_run())
    assert "minGRU" in copy.python("-m", "llmtrain.list", "models")
    losses = [record["loss"] for record in learned_records(folder.path) if "loss" in record]
    assert losses[-1] < losses[0] - 0.3
    plan = Plan.load(folder.plan)
    wide, words = 64, 4096
    layer = wide + 3 * wide * wide
    assert plan.num_parameters == words * wide + 2 * layer + wide
    assert "held-out" in said
    assert copy.python("-m", "llmtrain.generate", str(folder.path), "--prompt", "def ")

    elsewhere = copy.command.folder / "elsewhere"
    shutil.copytree(folder.final, elsewhere)
    told = (elsewhere / "README.md").read_text().replace(str(folder.final), str(elsewhere))
    opened = "import torch\n" + "".join(re.findall(r"^    (.*\n)", told, re.MULTILINE))
    opened += (
        "print(type(model).__name__, model(torch.zeros(1, 3, dtype=torch.long)).logits.shape)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = subprocess.run(
        [sys.executable, "-c", opened],
        capture_output=True,
        text=True,
        check=True,
        cwd=copy.command.folder,
        env=environment | {"HF_HOME": str(copy.command.folder / "hf")},
    ).stdout
    assert printed == f"MinGRUForCausalLM torch.Size([1, 3, {words}])\n"

    more = ["model=pretrained", f"model.path={folder.final}", *SMALL[2:], "train.max_steps=2"]
    copy.run(*more, "name=on")
    (on,) = set(copy.command.runs()) - {folder.path}
    first = next(record["loss"] for record in learned_records(on) if "loss" in record)
    assert first < losses[0] - 0.3

    file = copy.folder / "llmtrain" / "architecture" / "mingru.py"
    file.write_text(file.read_text().replace("+ 0.5", "+ 0.25"))
    assert "other code than that of architecture mingru" in copy.run(*own, code=2)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("broken", "class Config(:\n", "is no Python in line 1"),
        (
            "lacking",
            f"import nothing_of_this_name\n{FIELDS}",
            "cannot be imported (ModuleNotFoundError",
        ),
        ("empty", FIELDS, 'lacks a PreTrainedConfig with model_type = "empty"'),
        ("llama", "", "has the name of one of transformers"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused_in_a_line_and_hurts_no_other(
    copy: Copy, name: str, content: str, said: str
) -> None:
    (copy.folder / "llmtrain" / "architecture" / f"{name}.py").write_text(content)
    (copy.folder / "llmtrain" / "architecture" / "_helper.py").write_text("raise ValueError\n")
    line = copy.run("model=mingru_tiny", f"model.architecture={name}", module="plan", code=2)
    assert said in line
    assert line.startswith("model.") and line.count("\n") == 1
    if name != "llama":
        copy.run("model=llama_tiny", "hardware=cpux1", module="plan")


def test_a_data_format_an_optimizer_a_mode_and_a_model_of_ones_own_train(copy: Copy) -> None:
    archive = copy.command.folder / "texts.zip"
    with ZipFile(archive, "w") as opened:
        for path in copy.command.corpus.iterdir():
            opened.write(path, path.name)
    own = ["data=zipped", f"data.path={archive}", "optimizer=sgd", "mode=pretrain_z"]
    sizes = ["model=qwen3_tiny", "model.config.head_dim=32", "model.config.vocab_size=512"]
    copy.run(*own, *sizes, *SMALL, "train.max_steps=3", "data.held_out_every=4")
    folder = copy.command.only_run()
    records = [record for record in learned_records(folder) if "loss" in record]
    assert len(records) == 3
    assert all(record["z_loss"] > 0 for record in records)


def test_a_dataset_of_ones_own_is_one_yaml(copy: Copy) -> None:
    words = ["data=notes", f"data.path={copy.command.corpus}", "model=llama_tiny"]
    assert "notes" in copy.run(*words, "hardware=cpux1", module="plan")
