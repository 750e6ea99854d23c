"""The allocator that ranks on a CPU run with: what it promises, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import blocks

pytestmark = pytest.mark.skipif(
    not blocks.is_possible(), reason="needs Linux with glibc and a C compiler, and no LD_PRELOAD"
)

PREFACE = """
import ctypes, os, random, threading
libc = ctypes.CDLL(None)
for name in ("malloc", "calloc", "realloc", "aligned_alloc", "reallocarray"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.malloc_usable_size.restype = ctypes.c_size_t

def malloc(size): return libc.malloc(ctypes.c_size_t(size))
def calloc(size): return libc.calloc(ctypes.c_size_t(1), ctypes.c_size_t(size))
def realloc(at, size): return libc.realloc(ctypes.c_void_p(at), ctypes.c_size_t(size))
def free(at): libc.free(ctypes.c_void_p(at))
def fill(at, size, value): ctypes.memset(at, value, size)
def ends(at, size): return ctypes.string_at(at, 64), ctypes.string_at(at + size - 64, 64)

def resident_mib(name="VmHWM"):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

MIB = 2**20
"""


def run(program: str, library: Path | None, *options: str) -> str:
    """What a Python program prints with the allocator preloaded, or without."""
    environment = os.environ | ({"LD_PRELOAD": str(library)} if library else {})
    done = subprocess.run(
        [*options, sys.executable, "-c", PREFACE + program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library(cache: Path) -> Path:
    found = blocks.library_in(cache)
    assert found is not None
    return found


def test_a_process_takes_what_its_blocks_took_at_their_most(library: Path) -> None:
    """Blocks of changing sizes among small ones that stay, as in a training step."""
    peak = run(
        """
random.seed(0)
before, live, most, total, small = resident_mib("VmRSS"), [], 0, 0, []
for number in range(3000):
    size = random.choice((1, 2, 3, 5, 7, 11, 16)) * MIB // 2
    while total + size > 200 * MIB:
        at, freed = live.pop(random.randrange(len(live)))
        free(at)
        total -= freed
    live.append((malloc(size), size))
    fill(*live[-1], 1)
    small.append(malloc(1000))
    total += size
    most = max(most, total)
print((resident_mib() - before) / (most / MIB))
""",
        library,
    )
    assert float(peak) < 1.1


def test_what_is_freed_is_taken_again_without_faults(library: Path) -> None:
    faults = run(
        """
import resource
def round():
    blocks = [malloc(4 * MIB) for _ in range(20)]
    for at in blocks:
        fill(at, 4 * MIB, 1)
    for at in blocks:
        free(at)
round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""",
        library,
    )
    assert int(faults) < 100  # of 200,000 that glibc's own way takes


STRESS = """
def stress(seed):
    random_, live = random.Random(seed), {}
    for number in range(4000):
        size = random_.randrange(64, random_.choice((4096, 2 * MIB, 2 * MIB)))
        value = number % 255 + 1
        kind = random_.choice(("malloc", "calloc", "realloc", "free", "free", "aligned"))
        if kind == "malloc":
            at = malloc(size)
        elif kind == "calloc":
            at = calloc(size)
            assert ends(at, size) == (bytes(64), bytes(64)), "calloc gave what was not zero"
        elif kind == "aligned":
            alignment = random_.choice((64, 4096, 2 * MIB))
            at = libc.aligned_alloc(ctypes.c_size_t(alignment), ctypes.c_size_t(size))
            assert at % alignment == 0
        elif not live:
            continue
        else:
            at = random_.choice(list(live))
            had, old = live.pop(at)
            assert ends(at, had) == (bytes([old]) * 64,) * 2, "a block was changed"
            if kind == "free":
                free(at)
                continue
            at = realloc(at, size)
            assert ctypes.string_at(at, 64) == bytes([old]) * 64, "realloc lost values"
        assert libc.malloc_usable_size(ctypes.c_void_p(at)) >= size
        fill(at, size, value)
        live[at] = size, value
"""


def test_blocks_keep_their_values_whatever_threads_do(library: Path) -> None:
    """malloc, calloc, realloc, aligned_alloc and free in four threads at once, and in a child."""
    said = run(
        STRESS
        + """
failures = []
def guarded(seed):
    try:
        stress(seed)
    except BaseException as error:
        failures.append(repr(error))
threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
child = os.fork()
if child == 0:
    stress(9)
    os._exit(0)
for thread in threads:
    thread.join()
print(failures, os.waitpid(child, 0)[1])
""",
        library,
    )
    assert said.split("\n")[0] == "[] 0"


def test_a_process_without_addresses_to_spare_has_glibcs_blocks(library: Path) -> None:
    """As under `ulimit -v`, which some clusters set."""
    said = run(STRESS + "stress(0)\nprint('done')", library, "prlimit", "--as=2000000000")
    assert said == "done\n"


def test_a_request_that_no_machine_can_meet_is_refused(library: Path) -> None:
    assert run("print(malloc(2**62), calloc(2**62))", library) == "None None\n"


def test_without_a_compiler_ranks_start_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks.is_possible.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        assert blocks.preloaded(tmp_path / "cache") == {}
    finally:
        blocks.is_possible.cache_clear()


def test_a_compiler_that_fails_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert blocks.preloaded(tmp_path / "cache") == {}
    assert not list((tmp_path / "cache" / "blocks").iterdir())


def test_what_a_user_preloads_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks.is_possible.cache_clear()
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    try:
        assert blocks.preloaded(tmp_path / "cache") == {}
    finally:
        blocks.is_possible.cache_clear()


def test_a_block_grows_where_it_lies(library: Path) -> None:
    """What grows by a little, again and again, is not copied each time."""
    said = run(
        """
at, moves = malloc(MIB), 0
for size in range(2, 513):
    fill(at + (size - 2) * MIB, MIB, size % 251)
    new = realloc(at, size * MIB)
    at, moves = new, moves + (new != at)
assert all(ctypes.string_at(at + (n - 2) * MIB, 9) == bytes([n % 251]) * 9 for n in range(2, 513))
print(moves, resident_mib() < 700)
""",
        library,
    )
    assert said == "0 True\n"


def test_a_damaged_library_is_made_again(tmp_path: Path) -> None:
    first = blocks.library_in(tmp_path)
    assert first is not None
    whole = first.read_bytes()
    first.write_bytes(whole[:1000])
    blocks.library_in.cache_clear()
    again = blocks.library_in(tmp_path)
    assert again is not None
    assert again.read_bytes() == whole


def test_a_cache_whose_path_has_a_space_is_no_obstacle(tmp_path: Path) -> None:
    found = blocks.library_in(tmp_path / "my cache")
    assert found is not None
    assert blocks.works(found)
