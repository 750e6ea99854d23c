from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llmtrain.data.corpus import Tokenizer
from llmtrain.data.raft import Prompt, score_answer
from llmtrain.data.source.stdlib_qa import StdlibQa, described_in
from llmtrain.data.source.stdlib_raft import HEADINGS, StdlibRaft
from llmtrain.errors import ConfigError

PROMPTS = Path(__file__).parents[2] / "conf/prompt"
SHARED = {"tokenizer": Tokenizer(vocab_size=None), "validation_fraction": 0.05}


def prompt(name):
    return Prompt(**OmegaConf.to_container(OmegaConf.load(PROMPTS / f"{name}.yaml")))


def raft(**options):
    return StdlibRaft(name="stdlib_raft", **SHARED, **{"prompt": prompt("stdlib"), **options})


def qa(**options):
    return StdlibQa(name="stdlib_qa", **SHARED, **options)


def refuse(error):
    raise error


def test_a_functions_source_is_asked_about_and_its_docstring_is_the_answer():
    examples = list(qa().examples(refuse))
    assert len(examples) > 2000
    assert len({example.id for example in examples}) == len(examples)
    answers = {example.place: example.messages for example in examples}
    question, answer = answers["stdlib:shlex.join"]
    assert question.content.startswith("def join(split_command):\n    return")
    assert answer.content == "Return a shell-escaped string from *split_command*."


def test_a_module_is_described_without_being_imported():
    source = (
        b'"""Top.\n\nMore."""\nclass A:\n    def f(self):\n'
        b'        """Two\n        lines."""\n        return 1\n'
    )
    items = [(item.name, item.kind, item.doc, item.code) for item in described_in("p/m.py", source)]
    assert items == [
        ("p.m", "module", "Top.", ""),
        ("p.m.A.f", "function", "Two lines.", "def f(self):\n    return 1"),
    ]
    assert list(described_in("old.py", b"print 'Python 2'")) == []


def test_every_embedded_raft_answer_has_all_sections_and_cites_its_oracle():
    examples = list(raft().examples(refuse))
    assert len(examples) > 2000
    assert sum(len(example.messages[-2].content) < 1300 for example in examples) > 0.99 * len(
        examples
    )
    for example in examples:
        score = score_answer(example.reference, example, HEADINGS)
        assert (score.section_share, score.quote_share, len(score.cited)) == (1.0, 1.0, 1)
        assert score.uses_oracle
    assert {len(example.documents) for example in examples} == {3}


def test_embedded_rows_depend_on_the_seed_alone():
    first, again, other = (list(raft(seed=seed).examples(refuse)) for seed in (0, 0, 1))
    assert first == again
    assert [example.id for example in first] == [example.id for example in other]
    assert first[0].messages != other[0].messages
    assert raft().fingerprint() != raft(seed=1).fingerprint()


def test_embedded_data_is_estimated_within_a_quarter_without_being_made():
    for corpus in (qa(), raft()):
        corpus.check()
        made = sum(
            len(message.content.encode()) + 16
            for example in corpus.examples(refuse)
            for message in example.messages
        )
        assert abs(corpus.num_bytes() / made - 1) < 0.25


def test_embedded_data_refuses_paths_and_headings_that_its_answers_do_not_have():
    with pytest.raises(
        ConfigError, match="^data.path=a has no effect .*; say data=chat data.path=a"
    ):
        qa(path="a").check()
    with pytest.raises(ConfigError, match="^data.validation_path=a has no effect .*data=raft"):
        raft(validation_path="a").check()
    with pytest.raises(ConfigError, match="^data.sections=A,B are 2 headings"):
        raft(sections=["A", "B"]).check()


@pytest.mark.parametrize("path", sorted(PROMPTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_prompt_can_be_filled_in(path):
    shipped = prompt(path.stem)
    shipped.check()
    assert len(set(shipped.sections)) == len(shipped.sections) > 2
