"""Memory that a rank on a CPU keeps and takes again, through an allocator of large blocks.

``blocks.c`` says how. It is compiled once, in a fraction of a second, and preloaded into ranks.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from uuid import uuid4

SOURCE = Path(__file__).with_suffix(".c")
LIBRARIES = ("-ldl", "-pthread")
SECONDS = 60  # that compiling may take


def preloaded(cache_root: Path) -> dict[str, str]:
    """The environment of a process with the allocator; empty where it cannot be had."""
    library = library_in(cache_root)
    return {"LD_PRELOAD": str(library)} if library else {}


@cache
def is_possible() -> bool:
    """Whether this is glibc with a compiler, and the user preloads nothing that it would meet."""
    has_glibc = sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names
    return has_glibc and compiler() is not None and not os.environ.get("LD_PRELOAD")


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


@cache
def library_in(cache_root: Path) -> Path | None:
    """The allocator, compiled unless it has been; None where that fails."""
    if not is_possible():
        return None
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = place_in(cache_root) / "blocks" / f"{name}.so"
    try:
        if not works(path):
            build(path)
        return path if works(path) else None
    except (OSError, subprocess.SubprocessError):
        return None


def place_in(cache_root: Path) -> Path:
    """The cache, unless LD_PRELOAD would take its path for several."""
    if not set(" :") & set(str(cache_root)):
        return cache_root.absolute()
    return Path(tempfile.gettempdir(), f"llmtrain-{os.getuid()}")


def build(path: Path) -> None:
    """Compile to ``path``, which is there wholly or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{uuid4().hex}.so")
    options = ["-O2", "-shared", "-fPIC", "-o", str(unfinished), str(SOURCE), *LIBRARIES]
    command = [str(compiler()), *options]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def works(path: Path) -> bool:
    """Whether a process starts with the library: a damaged one, or one on a disk that nothing may
    be executed from, would be left out or end it."""
    trial = "import sys; sys.exit(sys.argv[1] not in open('/proc/self/maps').read())"
    command = [sys.executable, "-S", "-c", trial, path.name]
    environment = os.environ | {"LD_PRELOAD": str(path)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS)
    return done.returncode == 0
