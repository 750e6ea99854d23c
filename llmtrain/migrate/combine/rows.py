"""Where the rows or texts lie, how they are written, and what of them is learned or held out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain.migrate.combine.method import learns_texts
from llmtrain.migrate.correspondence import (
    Ask,
    Case,
    Given,
    Left,
    Made,
    Setting,
    Terms,
    is_off,
    sources,
    switched_on,
)

CATALOGUE = "dataset_info.json"  # LLaMA-Factory's, beside the data
KNOWN_TYPES = ("alpaca", "chat_template", "completion", "sharegpt")
FIELDS = "each row's format is told by its fields: rename them as docs/teaching.md has it"
ONE_PATH = "put the files into one folder: data.path=<folder>"


def data(terms: Terms, case: Case) -> Made:
    """The data of a file that names a model."""
    if "model.path" not in terms:
        return
    is_text = learns_texts(terms)
    yield "data", Setting("text" if is_text else "chat", "the mode")
    yield from source(terms, case)
    yield from held_out(terms, case)
    if not is_text:
        yield from packing(terms)
        yield from template(terms)
        yield from learned_part(terms)


def source(terms: Terms, case: Case) -> Made:
    """Where the rows to learn from lie; a word to add where that is not known."""
    for given in switched_on(terms, ("data.names", "data.rows", "data.texts")):
        places = yield from found(given, terms, case)
        if len(places) == 1 and places[0] is not None:
            yield "data.path", Setting(places[0], given.words)
            return
        why = ONE_PATH if len(places) > 1 else f"no {CATALOGUE} seen from here has it"
        yield Left(given.key, given.value, why, True)
        yield Ask(f"data.path=<rows of {titles(given.value)}>")
        return
    yield Ask("data.path=<rows>")


def found(given: Given, terms: Terms, case: Case) -> Any:
    """The place of each data set of a list; None for one that is not known here."""
    entries = given.value if isinstance(given.value, list) else [given.value]
    places = []
    for number, entry in enumerate(entries):
        if isinstance(entry, dict):
            yield from oddities(f"{given.key}[{number}]", entry)
            files = entry.get("data_files")
            places.append(first(files) if files else entry.get("path"))
        elif given.key in ("dataset", "eval_dataset"):
            places.append((yield from listed(str(entry), given.key, terms, case)))
        else:
            places.append(str(entry))
    return places


def first(files: Any) -> str:
    return str(files[0] if isinstance(files, list) else files)


def titles(value: Any) -> str:
    """The names of data sets, for a person."""
    entries = value if isinstance(value, list) else [value]
    names = (entry.get("path", "?") if isinstance(entry, dict) else entry for entry in entries)
    return ", ".join(str(name) for name in names)


def oddities(key: str, entry: dict[str, Any]) -> Iterator[Left]:
    """What else axolotl says of a data set."""
    for name, value in entry.items():
        is_known = name == "type" and str(value).partition(".")[0] in KNOWN_TYPES
        is_plain = name in ("path", "data_files", "ds_type") or (name, value) == ("split", "train")
        if not (is_known or is_plain or is_off(value)):
            why = ONE_PATH if name in ("split", "name", "shards") else FIELDS
            yield Left(f"{key}.{name}", value, why, True)


def listed(name: str, key: str, terms: Terms, case: Case) -> Any:
    """A data set's place by LLaMA-Factory's catalogue; None where it is not there."""
    folder = str(terms["data.folder"].value) if "data.folder" in terms else "data"
    places = [place / folder for place in (case.folder, *case.folder.parents, Path.cwd())]
    catalogue = next((place / CATALOGUE for place in places if (place / CATALOGUE).is_file()), None)
    if catalogue is None:
        return None
    entry = json.loads(catalogue.read_text(encoding="utf-8")).get(name, {})
    if entry.get("columns"):
        yield Left(f"{key}={name}: columns", entry["columns"], FIELDS, True)
    if "file_name" in entry:
        return str((catalogue.parent / entry["file_name"]).resolve())
    return entry.get("hf_hub_url")


def held_out(terms: Terms, case: Case) -> Made:
    """Rows of their own, or a share of all; some are always held out."""
    for given in switched_on(terms, ("data.held_out_names", "data.held_out_rows")):
        places = yield from found(given, terms, case)
        if len(places) == 1 and places[0] is not None and not learns_texts(terms):
            yield "data.validation_path", Setting(places[0], given.words)
        else:
            yield Left(given.key, given.value, "give them: data.validation_path=<rows>", True)
        return
    if size := terms.get("data.held_out"):
        yield from share(size, learns_texts(terms))


def share(given: Given, is_text: bool) -> Made:
    """A share of the rows; of texts one document in so many."""
    size = float(given.value)
    if 0 < size < 1 and is_text:
        yield "data.held_out_every", Setting(max(2, round(1 / size)), given.words)
    elif 0 < size < 1:
        yield "data.validation_fraction", Setting(size, given.words)
    else:
        key = "data.held_out_every=20" if is_text else "data.validation_fraction=0.05"
        yield Left(given.key, given.value, f"a twentieth is held out: {key}", True)


def packing(terms: Terms) -> Made:
    """Whether several rows share a sequence; here they never see each other."""
    given, apart = terms.get("data.packing"), switched_on(terms, ["data.packing_apart"])
    if apart:
        yield "data.packing", Setting(True, sources(apart))
    elif given is not None and is_off(given.value):
        but = "a row has a sequence of its own; data.packing=true is faster and learns more a step"
        yield "data.packing", Setting(False, given.words, but)
    elif given is not None:
        but = "rows of one sequence do not see each other" if given.key == "packing" else ""
        yield "data.packing", Setting(True, given.words, but)


def template(terms: Terms) -> Made:
    """The chat template; other names than chatml are those of a trainer's own templates."""
    given = terms.get("data.template")
    if given is None or is_off(given.value):
        return
    if given.value == "chatml":
        yield "data.template", Setting("chatml", given.words)
    elif given.value != "tokenizer_default":
        but = "the tokenizer's own chat template; data.template=<file>.jinja takes another"
        yield "data.template", Setting(None, given.words, but)


def learned_part(terms: Terms) -> Made:
    """All tokens, or the last answer's, where the answers' are not what is learned."""
    for name in ("all", "last"):
        for given in switched_on(terms, [f"data.loss_on_{name}"]):
            yield "data.loss_on", Setting(name, given.words)
