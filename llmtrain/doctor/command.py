"""This machine in one screen, and what to do about it. Exit code 1 where a line is red, else 0."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import NoReturn

from rich.console import Console

from llmtrain.doctor.examination import examine
from llmtrain.doctor.fix import SETTINGS, by_hand, end_processes, write_settings
from llmtrain.doctor.line import Line, State
from llmtrain.doctor.patient import Patient
from llmtrain.doctor.show import show, summary
from llmtrain.errors import DONE, FAILED, REFUSED


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{message}; see python -m llmtrain.doctor --help.\n")


def parser() -> argparse.ArgumentParser:
    options = Parser(prog="python -m llmtrain.doctor", description=__doc__)
    form = options.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a list of lines for programs")
    form.add_argument(
        "--fix",
        action="store_true",
        help="write what can be set to llmtrain.env, and ask which processes left on GPUs to end",
    )
    options.add_argument(
        "--quick", action="store_true", help="leave out measurements, the training and presets"
    )
    return options


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # a preset's remarks are no finding
    patient = Patient()
    try:
        lines = findings(patient, arguments)
        if arguments.json:
            print(json.dumps([asdict(line) for line in lines], indent=2, ensure_ascii=False))
        if arguments.fix:
            fix(patient, lines)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return FAILED
    return FAILED if any(line.state is State.red for line in lines) else DONE


def findings(patient: Patient, arguments: argparse.Namespace) -> list[Line]:
    """Look at everything, and show each line as soon as it is known."""
    console = Console(quiet=arguments.json)
    seen = []
    what = "" if arguments.quick else "; measurements take a minute or two"
    with console.status(f"looking at this machine{what}"):
        for line in examine(patient, arguments.quick):
            show(line, console)
            seen.append(line)
    console.print(f"\n{summary(seen)}", highlight=False)
    return seen


def fix(patient: Patient, lines: list[Line]) -> None:
    """Do what can be done and say what cannot."""
    for said in end_processes(patient.holders, answer if sys.stdin.isatty() else None):
        print(said)
    try:
        print(write_settings(lines))
    except OSError as error:
        print(f"{SETTINGS} cannot be written: {error.strerror}")
    for rest in by_hand(lines):
        print(f"by hand: {rest}")


def answer(question: str) -> str:
    """What the user types; nothing at the end of input."""
    try:
        return input(question)
    except EOFError:
        return ""
