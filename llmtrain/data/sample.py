"""Example rows of each format, to copy and to try; made from the interpreter's own library."""

from itertools import islice
from typing import Any

from llmtrain.data.source.stdlib import root
from llmtrain.data.source.stdlib_qa import Described, qa_items
from llmtrain.data.source.stdlib_raft import HEADINGS, raft_rows
from llmtrain.errors import ConfigError, nearest

NUM_ROWS = 6
TASK = "Say in one sentence what this function does."

Values = dict[str, Any]


def sample_rows(kind: str) -> list[Values]:
    """Some rows in a format: alpaca, sharegpt, messages, prompt, text or raft.

    Raises ConfigError for a format that does not exist.
    """
    if kind == "raft":
        return [row.values for row in islice(raft_rows(HEADINGS, seed=0), NUM_ROWS)]
    if kind not in WRITERS:
        raise ConfigError("format", kind, "is no format of rows", nearest(kind, [*WRITERS, "raft"]))
    rows = [WRITERS[kind](item) for item in islice(qa_items(), NUM_ROWS)]
    if not rows:
        raise ConfigError("format", kind, f"finds no source in {root()}", "use another Python")
    return rows


def alpaca(item: Described) -> Values:
    return {"instruction": TASK, "input": item.code, "output": item.doc}


def sharegpt(item: Described) -> Values:
    asked = {"from": "human", "value": f"{TASK}\n\n{item.code}"}
    return {"conversations": [asked, {"from": "gpt", "value": item.doc}]}


def messages(item: Described) -> Values:
    system = {"role": "system", "content": TASK}
    asked = {"role": "user", "content": item.code}
    return {"messages": [system, asked, {"role": "assistant", "content": item.doc}]}


def prompt(item: Described) -> Values:
    return {"prompt": f"{item.code}\n# This function: ", "completion": item.doc}


def text(item: Described) -> Values:
    return {"text": f"# {item.doc}\n{item.code}\n"}


WRITERS = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "messages": messages,
    "prompt": prompt,
    "text": text,
}
