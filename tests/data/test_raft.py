import json

import pytest

from llmtrain.data.corpus import Tokenizer
from llmtrain.data.example import Evidence, Example
from llmtrain.data.raft import Prompt, RaftWriter, raft_messages, score_answer, sections_of
from llmtrain.data.source.raft import Raft
from llmtrain.errors import ConfigError

PROMPT = Prompt(
    system="Answer from documents.",
    user="{documents}\n\n{question}\n{sections}",
    document="[{number}] {content}",
    no_documents="(none)",
    sections=["Evidence", "Answer"],
)
ROW = {
    "question": "What colour has grass?",
    "documents": [
        {"content": "Grass is green in spring.", "type": "oracle"},
        {"content": "The sky is blue.", "type": "distractor"},
        {"content": "Snow {is} white.", "type": "distractor"},
    ],
    "teacher_answer": '**Evidence**\n[1] "Grass is green in spring."\n**Answer**\nGreen.',
}
MEDICAL = ["问题", "假设/已知信息", "证据引用", "紧急就医指示(红旗症状)"]


def example(row=ROW, **options):
    return RaftWriter(PROMPT, **options).example(row, "a.json:1")


def without(*names, **values):
    return {name: value for name, value in {**ROW, **values}.items() if name not in names}


def test_a_row_is_asked_with_its_documents_and_answered_by_the_teacher():
    made = example()
    system, user, answer = made.messages
    assert system == ("system", "Answer from documents.")
    assert user.content.endswith("\n\nWhat colour has grass?\nEvidence\nAnswer")
    for number, document in enumerate(made.documents, start=1):
        assert f"[{number}] {document.content}" in user.content
    assert answer == ("assistant", made.reference)
    assert made.question == ROW["question"]


def test_the_seed_decides_the_order_and_citations_follow_it():
    places = set()
    for seed in range(12):
        made = example(seed=seed)
        assert made == example(seed=seed)
        place = [document.is_oracle for document in made.documents].index(True) + 1
        assert f'[{place}] "Grass' in made.reference
        places.add(place)
    assert places == {1, 2, 3}


def test_numbers_that_cite_nothing_stay_as_they_are():
    answer = 'x[1] costs [7] and "[1] in a quote"'
    for seed in range(5):
        assert example({**ROW, "teacher_answer": answer}, seed=seed).reference == answer


def test_the_oracle_is_left_out_for_its_share_of_rows_with_its_citations():
    rows = [{**ROW, "question": f"Question {number}?"} for number in range(400)]
    made = [example(row, drop_oracle_fraction=0.3) for row in rows]
    dropped = [item for item in made if not any(document.is_oracle for document in item.documents)]
    assert 90 < len(dropped) < 150
    assert all(len(item.documents) == 2 and "[" not in item.reference for item in dropped)
    alone = {**ROW, "documents": ROW["documents"][:1]}
    assert example(alone, drop_oracle_fraction=1.0).documents[0].is_oracle


def test_all_rows_of_one_question_have_one_id():
    assert example().id == example({**ROW, "teacher_answer": "Green."}).id
    assert example().id != example({**ROW, "question": "Why?"}).id


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (without("question"), "has no question"),
        (without("teacher_answer"), "has no teacher_answer"),
        (without(teacher_answer=" "), "has an empty teacher_answer"),
        (without("documents"), "has no list of documents"),
        (without(documents=ROW["documents"][1:]), "has no oracle document"),
        (without(documents=["text"]), "has str and not an object as document 1"),
        (without(documents=[{"content": "x", "type": "gold"}]), "has type 'gold' in document 1"),
        (
            without(documents=[{"content": "", "type": "oracle"}]),
            "has an empty content in document",
        ),
        (without(question="\ud800"), "holds half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_asked_or_answered_is_refused_with_its_place(row, reason):
    with pytest.raises(ConfigError, match=rf"^data.path=a.json:1: {reason}"):
        example(row)


def test_a_question_without_documents_and_with_other_sections_can_be_asked():
    *_, user = raft_messages("Why?", (), PROMPT, ["Reasons"])
    assert user.content == "(none)\n\nWhy?\nReasons"


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"user": "{documents} {query}"}, r"data.prompt.user=.* has \{query\}, which is no field"),
        ({"user": '{"a": 1'}, "data.prompt.user=.* cannot be filled in"),
        ({"user": "{documents}"}, r"data.prompt.user=.* does not show \{question\}; add it"),
        ({"document": "[{number}]"}, r"data.prompt.document=.* does not show \{content\}"),
    ],
)
def test_a_prompt_that_cannot_be_filled_in_is_refused(texts, reason):
    with pytest.raises(ConfigError, match=f"^{reason}"):
        Prompt(**{"user": "{question}", "document": "{content}", **texts}).check()


def test_a_file_of_rows_is_read_and_its_fingerprint_follows_what_changes_them(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ROW, {"question": "x"}]))

    def corpus(**options):
        return Raft(
            name="raft",
            path=str(tmp_path / "a.json"),
            tokenizer=Tokenizer(vocab_size=None),
            validation_fraction=0.05,
            **{"prompt": PROMPT, **options},
        )

    corpus().check()
    errors = []
    assert [made.place for made in corpus().examples(errors.append)] == [f"{tmp_path}/a.json:1"]
    assert "a.json:2: has no teacher_answer" in str(errors[0])
    changes = [
        {"seed": 1},
        {"sections": ["A"]},
        {"drop_oracle_fraction": 0.5},
        {"prompt": Prompt()},
    ]
    assert len({corpus(**change).fingerprint() for change in [{}, *changes]}) == 5


def test_headings_are_found_however_they_are_written():
    answer = (
        "## 问题\n头痛三天。问题在于:\n问题在于疼痛\n**假设 / 已知信息**：无\n"
        "【证据引用】\n“饮水”\n4. 紧急就医指示（红旗症状）:\n呕吐"
    )
    assert sections_of(answer, MEDICAL) == {
        "问题": "头痛三天。问题在于:\n问题在于疼痛",
        "假设/已知信息": "无",
        "证据引用": "“饮水”",
        "紧急就医指示(红旗症状)": "呕吐",
    }
    assert sections_of("the answer: x\nAnswering", ["Answer"]) == {}


def test_a_score_tells_what_an_answer_has_and_where_its_evidence_lies():
    given = (Evidence("The sky is blue.", False), Evidence("Grass is\ngreen in spring.", True))
    asked = Example("id", "a:1", documents=given)
    answer = 'Evidence:\n[2], [9] "Grass is green" ##begin_quote##no such text##end_quote## "x"'
    score = score_answer(answer, asked, PROMPT.sections)
    assert (score.sections, score.section_share) == (("Evidence",), 0.5)
    assert (score.num_quotes, score.quote_share, score.cited) == (2, 0.5, (2,))
    assert score.uses_oracle
    assert score_answer("“Grass is green”", asked, []).uses_oracle
    wrong = score_answer("“The sky is blue” [1]", asked, ["Answer"])
    assert (wrong.quote_share, wrong.section_share, wrong.uses_oracle) == (1.0, 0.0, False)
    assert score_answer("", asked, []).quote_share == 0.0


def test_the_teachers_own_answer_scores_fully():
    made = example(seed=3)
    score = score_answer(made.reference, made, PROMPT.sections)
    assert (score.section_share, score.quote_share, score.uses_oracle) == (1.0, 1.0, True)
