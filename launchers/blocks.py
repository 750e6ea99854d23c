"""Memory that a rank on a CPU keeps and takes again, through an allocator of large blocks.

``blocks.c`` says how. It is compiled once, in a fraction of a second, and preloaded into ranks.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from llmtrain.compiler import SECONDS, build, compiler

SOURCE = Path(__file__).with_suffix(".c")
LIBRARIES = ("-ldl", "-pthread")


def preloaded(cache_root: Path) -> dict[str, str]:
    """The environment of a process with the allocator; empty where it cannot be had."""
    library = library_in(cache_root)
    return {"LD_PRELOAD": str(library)} if library else {}


@cache
def is_possible() -> bool:
    """Whether this is glibc with a compiler, and the user preloads nothing that it would meet."""
    has_glibc = sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names
    return has_glibc and compiler() is not None and not os.environ.get("LD_PRELOAD")


@cache
def library_in(cache_root: Path) -> Path | None:
    """The allocator, compiled unless it has been; None where that fails."""
    if not is_possible():
        return None
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = place_in(cache_root) / "blocks" / f"{name}.so"
    try:
        if not works(path):
            build(SOURCE, path, ["-O2"], LIBRARIES)
        return path if works(path) else None
    except (OSError, subprocess.SubprocessError):
        return None


def place_in(cache_root: Path) -> Path:
    """The cache, unless LD_PRELOAD would take its path for several."""
    if not set(" :") & set(str(cache_root)):
        return cache_root.absolute()
    return Path(tempfile.gettempdir(), f"llmtrain-{os.getuid()}")


def works(path: Path) -> bool:
    """Whether a process starts with the library: a damaged one, or one on a disk that nothing may
    be executed from, would be left out or end it."""
    trial = "import sys; sys.exit(sys.argv[1] not in open('/proc/self/maps').read())"
    command = [sys.executable, "-S", "-c", trial, path.name]
    environment = os.environ | {"LD_PRELOAD": str(path)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS)
    return done.returncode == 0
