"""A student comes nearer to its teacher: by its probabilities, from disk, by its own answers."""

# B batch, L length, V vocabulary

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from llmtrain.config import RunConfig
from llmtrain.data.rows import read_rows
from llmtrain.data.sequences import open_sequences
from llmtrain.data.shards import Manifest, prepare
from llmtrain.job import Job
from llmtrain.kernel.divergence import Divergence
from llmtrain.mode.base import Learner
from llmtrain.mode.distill import Distill, Method, Targets, written_by
from llmtrain.plan import make_plan
from llmtrain.teaching import check_tokenizers, prepare_targets
from tests.conftest import Command
from tests.finished_models import Models
from tests.test_compose import call, compose_config
from tests.test_train import Bench

ENDS = list(range(20))  # so many tokens end an answer that some answers end early


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def teacher(models: Models) -> Path:
    """A Llama of its own opinions, with the student's tokenizer and more rows for its tokens."""
    return make_teacher(models, "teacher", seed=5)


def make_teacher(models: Models, name: str, seed: int) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = models.root / name
    shutil.copytree(models.llama, path)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(models.llama, vocab_size=320)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 2:
                param.mul_(6)
    model.save_pretrained(path)
    return path


def opened(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


class Lessons(Bench):
    """Fills the folders of runs in which a Llama is taught by a teacher."""

    def __init__(self, command: Command, models: Models, teacher: Path) -> None:
        super().__init__(command)
        self.models, self.teacher = models, teacher

    def config(self, name: str, *overrides: str) -> RunConfig:
        command, models = self.command, self.models
        words = [f"name={name}", f"cache_root={command.cache}", f"output_root={command.folder}"]
        words += ["mode=distill", "data=chat", f"data.path={models.chat_rows}", "optimizer=adamw"]
        words += ["data.validation_fraction=0.3", "optimizer.lr=2e-3", "train.precision=fp32"]
        words += ["model=pretrained", f"model.path={models.llama}", "hardware=cpux1"]
        words += ["model@teacher=pretrained", f"teacher.path={self.teacher}"]
        words += ["train.seq_len=64", "train.global_batch=4", "train.max_steps=12"]
        return compose_config(*words, *overrides)

    def prepared(self, config: RunConfig) -> Manifest:
        return prepare(config.data, config.cache, config.tokenizer_path, progress=False)

    def targets(self, config: RunConfig) -> Path:
        """The folder of the teacher's probabilities, made now unless it is there."""
        manifest = self.prepared(config)
        path = prepare_targets(config, make_plan(config, manifest), manifest)
        assert path is not None
        return path

    def add(self, name: str, do: str, *overrides: str) -> None:
        config = self.config(name, *overrides)
        manifest = self.prepared(config)
        check_tokenizers(config, manifest.vocabulary)
        plan = make_plan(config, manifest)
        job = Job(config, plan, manifest, prepare_targets(config, plan, manifest))
        job.fill_folder()
        self.tasks.append({"do": do, "folder": str(job.folder.path)})


@pytest.fixture
def lessons(command: Command, models: Models, teacher: Path) -> Lessons:
    return Lessons(command, models, teacher)


def first_batch(lessons: Lessons, config: RunConfig) -> dict[str, Any]:
    packing = config.data.packs and config.mode.packs
    sequences = open_sequences(lessons.prepared(config), "train", 64, packing=packing)
    arrays = sequences.batch(range(4))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("divergence", Divergence)
def test_a_teacher_that_is_the_student_is_no_distance_away(
    lessons: Lessons, models: Models, divergence: Divergence
) -> None:
    mode = Distill(method=Method.logits, divergence=divergence, alpha=1.0, temperature=2.0)
    batch = first_batch(lessons, lessons.config("same", "mode.method=logits"))
    student, same = Learner(opened(models.llama).train()), Learner(opened(models.llama))
    loss = mode.loss(student, dict(batch), same)
    assert loss.loss_sum.item() == pytest.approx(0, abs=1e-3)
    far = mode.loss(student, dict(batch), Learner(opened(lessons.teacher)))
    mean = far.loss_sum.item() / int(far.num_tokens)
    assert mean > 0.1
    assert far.extras["divergence"].item() == pytest.approx(mean, rel=1e-5)


def test_a_held_out_loss_is_the_cross_entropy_whatever_is_learned(
    lessons: Lessons, models: Models
) -> None:
    batch = first_batch(lessons, lessons.config("plain", "mode.method=logits"))
    model = opened(models.llama).eval()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits_BLV = model(**inputs, use_cache=False).logits
    expected = cross_entropy(logits_BLV.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    for method in Method:
        loss = Distill(method=method).loss(Learner(model), dict(batch), None)
        torch.testing.assert_close(loss.loss_sum, expected, rtol=1e-5, atol=1e-3)
    answers = Distill(method=Method.answers).loss(Learner(model.train()), dict(batch))
    torch.testing.assert_close(answers.loss_sum, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("packing", [True, False])
def test_the_likeliest_tokens_from_disk_teach_what_the_teacher_itself_does(
    lessons: Lessons, models: Models, packing: bool
) -> None:
    words = ["mode.method=logits", "mode.targets=top_k", f"data.packing={str(packing).lower()}"]
    manifest = lessons.prepared(lessons.config("disk", *words))
    config = lessons.config("disk", *words, f"mode.top_k={manifest.vocabulary.size - 1}")
    cache = open_cache(config, manifest, lessons.targets(config))
    batch = first_batch(lessons, config)
    ids, probs = cache.read(range(4))
    targets = {"teacher_ids": torch.from_numpy(ids), "teacher_probs": torch.from_numpy(probs)}
    student, teacher = (opened(path) for path in (models.llama, lessons.teacher))
    for model in (student, teacher):  # the rows that no token has are no targets
        model.resize_token_embeddings(manifest.vocabulary.size)
    learner = Learner(student.train())
    from_disk = config.mode.loss(learner, {**batch, **targets})
    there = Distill(method=Method.logits).loss(learner, batch, Learner(teacher))
    assert from_disk.loss_sum.item() == pytest.approx(there.loss_sum.item(), rel=2e-3)


def open_cache(config: RunConfig, manifest: Manifest, path: Path) -> Any:
    from llmtrain.data.teacher_cache import TeacherCache
    from llmtrain.teaching import header_of

    return TeacherCache.open(path, header_of(config, make_plan(config, manifest), manifest))


def test_targets_are_made_once_for_each_teacher_and_way_of_packing(
    lessons: Lessons, models: Models
) -> None:
    words = ["mode.method=logits", "mode.targets=sampled"]
    config = lessons.config("once", *words)
    path = lessons.targets(config)
    made = (path / "ids.npy").stat().st_mtime_ns
    assert lessons.targets(lessons.config("again", *words, "train.max_steps=3")) == path
    assert lessons.targets(lessons.config("drawn", *words, "seed=3")) != path
    assert (path / "ids.npy").stat().st_mtime_ns == made
    shutil.rmtree(path)
    assert lessons.targets(config) == path
    assert (path / "ids.npy").stat().st_mtime_ns > made
    other = make_teacher(models, "other", seed=6)
    changes = [f"teacher.path={other}", "data.packing=false"]
    folders = {lessons.targets(lessons.config("other", *words, change)) for change in changes}
    assert len(folders | {path}) == 3


def written(learner: Learner, batch: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return written_by(learner, dict(batch), max_new_tokens, is_partitioned=False)


@pytest.fixture
def writing(lessons: Lessons, models: Models) -> tuple[Learner, dict[str, Any]]:
    """A student that ends answers now and then, and a batch of one row a sequence."""
    model = opened(models.llama).train()
    settings = {"eos_token_id": ENDS, "pad_token_id": 0}
    model.generation_config.update(**settings, do_sample=True, temperature=1e-3, top_p=0.1)
    return Learner(model), first_batch(lessons, lessons.config("own", "mode.method=on_policy"))


def test_only_what_the_student_wrote_is_graded_and_its_end_is_kept(
    writing: tuple[Learner, dict[str, Any]],
) -> None:
    learner, batch = writing
    own = written(learner, batch, max_new_tokens=12)
    ends = 0
    for row in range(4):
        begin = int((batch["labels"][row] >= 0).int().argmax())
        given, inputs, labels = batch["input_ids"][row], own["input_ids"][row], own["labels"][row]
        assert torch.equal(inputs[: begin + 1], given[: begin + 1])
        assert (labels[:begin] == -100).all()
        answer = labels[begin:][labels[begin:] >= 0]
        assert (labels[begin + len(answer) :] == -100).all()
        assert torch.equal(inputs[begin + 1 : begin + len(answer)], answer[:-1])
        is_end = torch.isin(answer, torch.tensor(ENDS))
        assert not is_end[:-1].any()
        assert bool(is_end[-1]) or len(answer) == 12
        ends += bool(is_end[-1])
    assert 0 < ends < 4
    assert learner.model.training


def test_the_student_writes_by_its_own_probabilities_whatever_its_settings_say(
    writing: tuple[Learner, dict[str, Any]],
) -> None:
    learner, batch = writing
    first = int((batch["labels"][0] >= 0).int().argmax())
    many = {name: values[:1].expand(3000, -1) for name, values in batch.items()}
    own = written(learner, many, max_new_tokens=1)
    share_V = torch.bincount(own["labels"][:, first], minlength=304) / 3000
    with torch.no_grad():
        logits_BLV = learner.model.eval()(batch["input_ids"][:1, : first + 1]).logits
    torch.testing.assert_close(share_V, logits_BLV[0, -1].softmax(-1), rtol=0, atol=0.04)


def test_a_share_of_batches_is_the_students_own_and_the_key_alone_decides_which(
    writing: tuple[Learner, dict[str, Any]],
) -> None:
    learner, batch = writing
    mode = Distill(method=Method.on_policy, student_fraction=0.3, max_new_tokens=1)
    one, two = (
        [mode.rewritten(learner, batch, key, False) is not batch for key in range(40)]
        for _ in range(2)
    )
    assert one == two
    assert 6 < sum(one) < 18


OWN = ["mode.method=on_policy", "mode.max_new_tokens=8"]
SPREAD = ["hardware=cpux2", "zero.stage=3", "train.max_steps=6"]


@pytest.fixture(scope="module")
def curves(
    cache: Path,
    corpus: Path,
    models: Models,
    teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[float]]:
    """The losses of students by their names, those of one rank and then those of two."""
    command = Command(cache, corpus, tmp_path_factory.mktemp("lessons"))
    one, two = (Lessons(command, models, teacher) for _ in range(2))
    for divergence in Divergence:
        words = [f"mode.divergence={divergence.value}", "mode.alpha=1"]
        one.add(divergence.value, "curve", "mode.method=logits", *words)
    for targets in (Targets.top_k, Targets.sampled):
        words = [f"mode.targets={targets.value}", "mode.alpha=1", "mode.top_k=100"]
        one.add(targets.value, "curve", "mode.method=logits", *words)
    one.add("own", "curve", *OWN)
    one.add("resumed", "save_and_continue", *OWN)
    one.add("mixed", "curve", "mode.method=logits", "zero.stage=0", "train.max_steps=6")
    two.add("spread", "curve", "mode.method=logits", *SPREAD)
    two.add("own_spread", "curve", *OWN, *SPREAD)
    found = [*one.run(1), *two.run(2)]
    names = [Path(task["folder"]).name.split("-")[0] for task in one.tasks + two.tasks]
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", [*(item.value for item in Divergence), "top_k", "sampled"])
def test_a_student_comes_nearer_to_its_teacher(curves: dict[str, list[float]], name: str) -> None:
    assert curves[name][-1] < 0.8 * curves[name][0]


def test_a_student_that_is_graded_on_its_own_answers_comes_nearer(
    curves: dict[str, list[float]],
) -> None:
    for name in ("own", "own_spread"):
        half = len(curves[name]) // 2
        assert sum(curves[name][half:]) < sum(curves[name][:half])


def test_a_checkpoint_continues_with_the_answers_that_would_have_been_written(
    curves: dict[str, list[float]],
) -> None:
    assert curves["resumed"] == curves["own"]


def test_two_ranks_at_stage_3_are_taught_as_one_at_stage_0(curves: dict[str, list[float]]) -> None:
    assert curves["spread"] == pytest.approx(curves["mixed"], rel=1e-3)


def test_the_share_of_rows_without_their_oracle_is_asked_of_the_mode(models: Models) -> None:
    for data in ("raft", "stdlib_raft"):
        words = ["mode=distill", f"data={data}", "mode.drop_oracle_fraction=0.5"]
        config = compose_config(*words, "model=pretrained", f"model.path={models.llama}")
        rows = [
            config.data.example(row, "data.path") for row in read_rows(str(models.raft_rows), print)
        ]
        asked = [any(document.is_oracle for document in row.documents) for row in rows]
        assert 4 < sum(asked) < 16
        assert compose_config("mode=sft", f"data={data}").data.drop_oracle_fraction == 0


REFUSED: dict[str, tuple[Callable[[Models], list[str]], str]] = {
    "another tokenizer": (
        lambda models: ["mode.method=logits", f"teacher.path={models.coarse}"],
        "has another tokenizer than the student",
    ),
    "a teacher in vain": (lambda models: ["mode.method=answers"], "has no effect with mode="),
    "targets of no use": (
        lambda models: ["mode.method=on_policy", "mode.targets=top_k"],
        "mode.targets=top_k is for mode.method=logits, not on_policy; take online",
    ),
    "more targets than tokens": (
        lambda models: ["mode.method=logits", "mode.targets=top_k", "mode.top_k=300"],
        "mode.top_k=300 is not below the",
    ),
    "a part is not enough": (
        lambda models: ["mode.method=logits", "mode.targets=top_k", "mode.divergence=jsd"],
        "mode.divergence=jsd needs all of the teacher's probabilities",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taught_is_refused_in_one_line_before_a_folder_is_made(
    case: str,
    lessons: Lessons,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    overrides, reason = REFUSED[case]
    asked = overrides(lessons.models)
    capfd.readouterr()
    words = [f"cache_root={lessons.command.cache}", f"output_root={lessons.command.folder / 'out'}"]
    words += ["mode=distill", "data=chat", f"data.path={lessons.models.chat_rows}"]
    words += ["hardware=cpux1", "model=pretrained", f"model.path={lessons.models.llama}"]
    words += ["model@teacher=pretrained", f"teacher.path={lessons.teacher}", "train.seq_len=64"]
    assert call([*words, *asked], monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert reason in said
    assert not (lessons.command.folder / "out").exists()
