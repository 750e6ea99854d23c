"""This machine's C compiler, for sources of ours that are compiled once and kept in the cache."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

SECONDS = 60  # that compiling may take


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def build(source: Path, path: Path, options: Sequence[str], libraries: Sequence[str] = ()) -> None:
    """Compile a shared library to ``path``, which is there wholly or not at all.

    Raises OSError or subprocess.SubprocessError where that fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{uuid4().hex}.so")
    words = [*options, "-shared", "-fPIC", "-o", str(unfinished), str(source), *libraries]
    try:
        command = [str(compiler()), *words]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
