"""Rows on disk as splits of a manifest: which side each is on, what is skipped, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmtrain.data.corpus import Tokenizer
from llmtrain.data.examples import ExampleRecipe, OnBadRow
from llmtrain.data.shards import Manifest, prepare, verify
from llmtrain.data.source.chat import Chat
from llmtrain.data.tokenising import mask_of
from llmtrain.data.tokenizer import load
from llmtrain.errors import ConfigError
from llmtrain.plan import make_plan
from tests.finished_models import Models
from tests.test_compose import call, compose_config

BAD = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


Corpus = Callable[..., Chat]


@pytest.fixture
def corpus(tmp_path: Path, models: Models) -> Corpus:
    """Makes data=chat of some rows with the Llama's tokenizer."""

    def make(rows: list[dict[str, object]], fraction: float = 0.3, **options: object) -> Chat:
        values = {"tokenizer": Tokenizer(str(models.llama), None), "recipe": ExampleRecipe()}
        path = write(tmp_path / "rows.jsonl", rows)
        return Chat(name="chat", path=path, validation_fraction=fraction, **values, **options)  # type: ignore[arg-type]

    return make


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(number: int) -> dict[str, object]:
    return {"prompt": f"{number}?", "completion": f" It is {number}."}


def long(number: int) -> dict[str, object]:
    return {"prompt": f"{number}? " * 50, "completion": "No."}


def texts(manifest: Manifest, split: str) -> list[str]:
    """The documents of a split in their order."""
    documents = []
    for shard in manifest.splits[split].shards:
        path = manifest.folder / shard.path
        starts = np.load(path.with_suffix(".npy"))
        documents += np.split(np.fromfile(path, dtype=manifest.dtype), starts[1:])
    return [load(manifest.vocabulary.folder).decode(document.tolist()) for document in documents]


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.9])
def test_no_side_is_empty_however_few_rows_there_are(
    corpus: Corpus, tmp_path: Path, fraction: float
) -> None:
    for count in (2, 3, 5, 9, 17, 30):
        manifest = prepare(corpus([row(n) for n in range(count)], fraction), tmp_path / "cache")
        train, held_out = (texts(manifest, name) for name in ("train", "held_out"))
        assert len(train) > 0
        assert len(held_out) > 0
        assert sorted(train + held_out) == sorted(f"{n}? It is {n}." for n in range(count))


def test_a_row_keeps_its_side_when_others_come_and_equal_rows_are_together(
    corpus: Corpus, tmp_path: Path
) -> None:
    few = prepare(corpus([row(n) for n in range(40)]), tmp_path / "cache")
    many = prepare(corpus([row(n % 60) for n in range(120)]), tmp_path / "cache")
    for split in ("train", "held_out"):
        assert set(texts(few, split)) <= set(texts(many, split))
    assert not set(texts(many, "train")) & set(texts(many, "held_out"))
    assert 0.15 < few.held_out.num_documents / 40 < 0.45


def test_rows_of_a_file_of_their_own_are_held_out(corpus: Corpus, tmp_path: Path) -> None:
    path = write(tmp_path / "validation.jsonl", [row(n) for n in range(50, 53)])
    manifest = prepare(corpus([row(0)], validation_path=path), tmp_path / "cache")
    assert texts(manifest, "train") == ["0? It is 0."]
    assert texts(manifest, "held_out") == [f"{n}? It is {n}." for n in range(50, 53)]


def test_what_is_learned_is_counted_in_tokens_and_in_bytes(corpus: Corpus, tmp_path: Path) -> None:
    manifest = prepare(corpus([row(n) for n in range(9)]), tmp_path / "cache")
    for name, split in manifest.splits.items():
        (shard,) = split.shards
        mask = np.fromfile((manifest.folder / shard.path).with_suffix(".mask"), dtype=np.uint8)
        assert split.num_learned_tokens == mask.sum()
        assert split.num_bytes == len(texts(manifest, name)) * len(" It is 1.<|endoftext|>")


def test_bad_rows_are_skipped_and_counted_where_that_is_asked(
    corpus: Corpus, tmp_path: Path, models: Models
) -> None:
    rows = [row(n) for n in range(8)]
    rows[2:2] = [BAD, {"prompt": "x"}]
    manifest = prepare(corpus(rows, on_bad_row=OnBadRow.skip), tmp_path / "cache")
    assert manifest.num_skipped == 2
    assert "rows.jsonl:3: has no turn of the assistant" in manifest.skipped[0]
    assert "rows.jsonl:4: has no completion" in manifest.skipped[1]
    assert manifest.train.num_documents + manifest.held_out.num_documents == 8
    config = compose_config(*words(models, tmp_path, tmp_path / "rows.jsonl"))
    assert "2 rows are skipped, the first: data.path=" in make_plan(config, manifest).warnings[0]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row(0), row(1), BAD], "rows.jsonl:3: has no turn of the assistant"),
        ([BAD, BAD], "rows.jsonl:1: has no turn of the assistant"),
        ([row(0), row(0)], "holds fewer than two different rows, .* data.validation_path"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_in_one_line(
    corpus: Corpus, tmp_path: Path, rows: list[dict[str, object]], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"^data.path=.*{reason}"):
        prepare(corpus(rows), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "tokens").glob("[!.]*[!k]"))  # locks alone


def words(models: Models, folder: Path, rows: Path) -> list[str]:
    found = ["mode=sft", "data=chat", f"data.path={rows}", "hardware=cpux1"]
    found += ["model=pretrained", f"model.path={models.llama}", "train.seq_len=64"]
    return [*found, f"cache_root={folder / 'cache'}", f"output_root={folder / 'outputs'}"]


def turns(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": f"I am {role}."} for role in roles]}


REFUSED = {
    "a bad row": ([row(0), BAD, row(1)], [], "rows.jsonl:2: has no turn of the assistant"),
    "a template": (
        [turns("system", "user", "assistant"), turns("user", "assistant")],
        ["data.template={template}"],
        "rows.jsonl:1: the chat template refuses it: No system prompt, please",
    ),
    "long answers": ([long(n) for n in range(9)], [], "train.seq_len=64 leaves nothing to learn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_on_such_rows_ends_with_one_line_before_its_folder_is_made(
    case: str,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows, overrides, reason = REFUSED[case]
    write(tmp_path / "rows.jsonl", rows)
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for turn in messages %}{{ turn.content }}{% if turn.role == 'system' %}"
        "{{ raise_exception('No system\nprompt, please') }}{% endif %}{% endfor %}"
    )
    overrides = [override.format(template=template) for override in overrides]
    line = [*words(models, tmp_path, tmp_path / "rows.jsonl"), *overrides]
    assert call(line, monkeypatch) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert reason in said
    assert not (tmp_path / "outputs").exists()


def test_a_mask_that_was_damaged_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    manifest = prepare(corpus([row(number) for number in range(20)]), tmp_path / "cache")
    verify(manifest)
    mask = mask_of(manifest.folder / manifest.train.shards[0].path)
    mask.write_bytes(bytes(1 - value for value in mask.read_bytes()))
    with pytest.raises(ConfigError, match="does not hold the tokens"):
        verify(manifest)
