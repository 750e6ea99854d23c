"""Installed versions beside those that everything was tested with."""

from importlib import metadata
from pathlib import Path

from llmtrain.doctor.ask import ROOT
from llmtrain.doctor.line import Line, green, red, yellow

CONSTRAINTS = ROOT / "constraints.txt"
NEEDED = ("torch", "deepspeed", "transformers", "peft")
INSTALL = "pip install -c constraints.txt -e ."


def constrained(text: str) -> dict[str, str]:
    """``{package: version}`` of a constraints file."""
    pairs = (line.strip().partition("==") for line in text.splitlines() if "==" in line)
    return {name: version for name, _, version in pairs}


def installed(names: list[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def versions(wanted: dict[str, str], found: dict[str, str]) -> Line:
    """What is missing is red; what is another version than the tested one is yellow."""
    missing = [name for name in NEEDED if name not in found]
    if missing:
        what = f"{', '.join(missing)} not installed"
        return red("packages", found=what, remedy=INSTALL)
    named = ", ".join(f"{name} {found[name]}" for name in NEEDED)
    others = [
        f"{name} {version}, tested with {wanted[name]}"
        for name, version in found.items()
        if name in wanted and version.split("+")[0] != wanted[name]
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        return yellow("packages", found="; ".join(others[:3]) + more, remedy=INSTALL)
    return green("packages", found=f"{named}, all {len(found)} as in constraints.txt")


def versions_here(path: Path = CONSTRAINTS) -> Line:
    wanted = constrained(path.read_text()) if path.exists() else {}
    return versions(wanted, installed([*NEEDED, *wanted]))


def nccl_packages() -> dict[str, str]:
    """Every installed build of NCCL."""
    return installed([f"nvidia-nccl-cu{major}" for major in (11, 12, 13, 14)])
