"""What a function is for, asked of the interpreter's own library: its source and its docstring."""

import ast
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from textwrap import dedent

from llmtrain.data.corpus import OnBad, digest
from llmtrain.data.example import Example
from llmtrain.data.examples import ExampleCorpus
from llmtrain.data.formats import to_example
from llmtrain.data.source.stdlib import modules, sources
from llmtrain.errors import ConfigError

LONGEST_CODE = 800  # characters
SHORTEST_DOC, LONGEST_DOC = 20, 300
BYTES_PER_SOURCE_BYTE = 0.14  # of the rows, measured on the library of Python 3.11
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Described:
    """A module, class or function of the library, and the first paragraph of its docstring.

    ``code`` is a function's source without the docstring.
    """

    module: str
    name: str
    kind: str
    doc: str
    code: str = ""


@dataclass
class StdlibQa(ExampleCorpus):
    """One row for each function or method that is short and has a docstring."""

    kind: str = "stdlib_qa"

    def check(self) -> None:
        super().check()
        check_embedded(self)

    def examples(self, on_bad: OnBad) -> Iterator[Example]:
        found: dict[str, Example] = {}  # some functions stand in several modules
        for item in qa_items():
            row = {"question": item.code, "answer": item.doc}
            example = to_example(row, f"stdlib:{item.name}")
            found.setdefault(example.id, example)
        return iter(found.values())

    def fingerprint(self) -> str:
        return library_fingerprint()

    def num_bytes(self) -> int:
        return int(BYTES_PER_SOURCE_BYTE * sum(os.path.getsize(path) for path in modules()))


def check_embedded(corpus: ExampleCorpus) -> None:
    """Refuse a path for data that comes from the interpreter, and an interpreter without source."""
    for key, path in (("path", corpus.path), ("validation_path", corpus.validation_path)):
        if path is not None:
            own = "raft" if corpus.kind == "stdlib_raft" else "chat"
            reason = f"has no effect with data={corpus.kind}"
            raise ConfigError(f"data.{key}", path, reason, f"say data={own} data.{key}={path}")
    if next(modules(), None) is None:
        remedy = "say data=chat data.path=<file>"
        raise ConfigError("data", corpus.kind, "finds no source of the library", remedy)


def library_fingerprint() -> str:
    limits = (LONGEST_CODE, SHORTEST_DOC, LONGEST_DOC)
    return digest([*limits, *(part for source in sources() for part in source)])


def qa_items() -> Iterator[Described]:
    """Every function whose source and first paragraph are neither too long nor too short."""
    for item in described():
        fits = SHORTEST_DOC <= len(item.doc) <= LONGEST_DOC and 0 < len(item.code) <= LONGEST_CODE
        if item.kind == "function" and fits:
            yield item


@cache  # reading the library takes seconds, and its rows are asked for several times
def described() -> tuple[Described, ...]:
    """Everything in the library that has a docstring, in order of modules and lines."""
    return tuple(item for name, source in sources() for item in described_in(name, source))


def described_in(name: str, source: bytes) -> Iterator[Described]:
    """What a module describes. It is parsed and never imported."""
    try:
        text = source.decode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for old escapes in strings
            tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):  # a few modules are kept in the form of Python 2
        return
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if doc := first_paragraph(tree):
        yield Described(module, module, "module", doc)
    yield from definitions(tree, module, module, text.splitlines())


def definitions(parent: ast.AST, module: str, prefix: str, lines: list[str]) -> Iterator[Described]:
    """Classes and functions below a node, named as Python's ``__qualname__`` has it."""
    for node in ast.iter_child_nodes(parent):
        name = prefix
        if isinstance(node, Definition):
            name = f"{prefix}.{node.name}"
            if doc := first_paragraph(node):
                yield from described_node(node, module, name, doc, lines)
            name += ".<locals>" if isinstance(node, FUNCTIONS) else ""
        yield from definitions(node, module, name, lines)


def described_node(
    node: Definition, module: str, name: str, doc: str, lines: list[str]
) -> Iterator[Described]:
    if isinstance(node, ast.ClassDef):
        yield Described(module, name, "class", doc)
    else:
        yield Described(module, name, "function", doc, code_without_doc(node, lines))


def first_paragraph(node: ast.AST) -> str:
    """The first paragraph of a docstring, single-spaced; empty where there is none."""
    doc = ast.get_docstring(node, clean=False)  # type: ignore[arg-type]
    return " ".join(cleandoc(doc).partition("\n\n")[0].split()) if doc else ""


def code_without_doc(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """A function's source, dedented, without the lines of its docstring."""
    doc = node.body[0]
    code = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
    return dedent("\n".join(code)).strip()
