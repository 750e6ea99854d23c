"""Tokenising a large text: constant memory, through kills, the same bytes, and how fast.

    python -m benchmarks.prepare [--megabytes 1000]

A text of that size is made by repeating and perturbing the interpreter's own library, as .txt,
.jsonl, .jsonl.gz and .parquet. It is prepared by one process, and by two that are killed three
times on the way; the shards have to be the same, byte for byte. A tenth of it says what memory and
seconds grow by. Memory is that of all processes together, without the pages of files, which a
system takes back. Beside it, the tokenizers library encodes the same documents in batches.
Writes results/<date>-<machine>/prepare.json and .md.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from llmtrain.data.source.stdlib import sources
from llmtrain.data.tokenizer import train_bpe, write
from llmtrain.folder import write_json, write_text
from llmtrain.hardware import cpu_name, num_cores

HERE = Path(__file__).parent
MB = 10**6
FILES = 20  # of each format
VOCABULARY = 8192
TRAINED_ON_MB = 8
ALONE_MB = 32  # that the library encodes by itself
KILLS = (0.25, 0.5, 0.75)  # of all slices
BATCH = 2**20  # characters, as ours


def main() -> None:
    usage = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=usage)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), options.megabytes)
    place = options.out / f"{date.today()}-{platform.machine()}" / "prepare.json"
    write_json(place, {"machine": cpu_name(), "cores": num_cores()} | found)
    write_text(place.with_suffix(".md"), page(found))
    print(page(found))


def measure(scratch: Path, megabytes: int) -> dict[str, Any]:
    tokenizer = make_tokenizer(scratch / "tokenizer")
    rows = {}
    library = {f"{threads} threads": library_rate(tokenizer, threads) for threads in (1, 2)}
    for size, all_workers in ((megabytes // 10, (1, 2)), (megabytes, (1,))):
        texts = scratch / f"texts_{size}"
        num_bytes = make_texts(texts, size * MB)
        for workers in all_workers:
            row = undisturbed(scratch / f"{size}_{workers}", texts, tokenizer, workers)
            row["mb_per_second"] = num_bytes / MB / row["seconds"]
            rows[f"{size} MB, {workers} {'process' if workers == 1 else 'processes'}"] = row
            print(f"{size} MB by {workers}: {row}", flush=True)
    name = f"{megabytes} MB, 2 processes, killed three times"
    rows[name] = killed(scratch / "killed", texts, tokenizer)
    is_same = rows[name]["sha"] == row["sha"]
    return {"rows": rows, "same_bytes": is_same, "library_mb_per_second": library}


def make_tokenizer(folder: Path) -> Path:
    folder.mkdir()
    write(train_bpe(documents(TRAINED_ON_MB * MB, seed=1), VOCABULARY), folder)
    return folder


def documents(num_bytes: int, seed: int) -> Iterator[str]:
    """Modules of the library with some of their words exchanged, no two alike."""
    chance = random.Random(seed)
    texts = [source.decode("utf-8", "replace") for _, source in sources()]
    words = sorted({word for text in texts[:50] for word in text.split()})
    made = 0
    while made < num_bytes:
        parts = chance.choice(texts).split(" ")
        for _ in range(len(parts) // 20 + 1):
            parts[chance.randrange(len(parts))] = chance.choice(words)
        text = " ".join(parts)
        made += len(text.encode())
        yield text


def make_texts(folder: Path, num_bytes: int) -> int:
    """Files of four formats with as much text each; the bytes of text."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    total = 0
    for number in range(FILES):
        for seed, ending in enumerate((".txt", ".jsonl", ".jsonl.gz", ".parquet")):
            share = num_bytes // FILES // 4
            texts = list(documents(share, seed=number * 4 + seed))
            total += sum(len(text.encode()) for text in texts)
            path = folder / f"{number:03d}{ending}"
            if ending == ".txt":
                path.write_text("\n".join(texts))
            elif ending == ".parquet":
                table = pyarrow.table({"text": texts})
                pyarrow.parquet.write_table(table, path, row_group_size=100)
            else:
                lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
                path.write_bytes(gzip.compress(lines, 1) if ending.endswith("gz") else lines)
    return total


def command(cache: Path, texts: Path, tokenizer: Path, workers: int) -> list[str]:
    words = ["data=text", f"data.path={texts}", f"data.tokenizer.path={tokenizer}"]
    words += [f"data.num_workers={workers}", f"cache_root={cache}"]
    return [sys.executable, "-m", "llmtrain.data", "prepare", *words]


def undisturbed(cache: Path, texts: Path, tokenizer: Path, workers: int) -> dict[str, Any]:
    begun = time.perf_counter()
    process = subprocess.Popen(command(cache, texts, tokenizer, workers), stdout=subprocess.PIPE)
    peak = watch(process)
    seconds = time.perf_counter() - begun
    assert process.returncode == 0
    found = {"seconds": seconds, "peak_mib": peak, "sha": sha_of(cache)}
    shutil.rmtree(cache)
    return found


def watch(process: "subprocess.Popen[bytes]") -> float:
    """The most memory in MiB that a process and its children had together, until it ends."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.5)
    return peak / 2**20


def resident(pid: int) -> int:
    """Bytes of a process and its children; what they share counts once."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(1024 * anonymous_kib(each.pid) for each in family)
    except (psutil.Error, OSError):  # one of them has just ended
        return 0


def anonymous_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


def killed(cache: Path, texts: Path, tokenizer: Path) -> dict[str, Any]:
    """Prepare with two processes, and end all of it at once three times."""
    begun = time.perf_counter()
    total = num_slices(texts)
    for share in KILLS:
        process = subprocess.Popen(command(cache, texts, tokenizer, 2), stdout=subprocess.DEVNULL)
        while process.poll() is None and num_done(cache) < share * total:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed after {num_done(cache)} of {total} slices", flush=True)
    subprocess.run(command(cache, texts, tokenizer, 2), check=True)
    found = {"seconds": time.perf_counter() - begun, "sha": sha_of(cache)}
    shutil.rmtree(cache)
    return found


def num_done(cache: Path) -> int:
    return len(list(cache.glob("shards/*/slice.json")))


def num_slices(texts: Path) -> int:
    from llmtrain.compose import composed

    return len(list(composed(["data=text", f"data.path={texts}"]).data.slices()))


def sha_of(cache: Path) -> str:
    """One hash of all shards, by the manifest's order."""
    (manifest,) = cache.glob("tokens/*/manifest.json")
    splits = json.loads(manifest.read_text())["splits"].values()
    sha = hashlib.sha256()
    for shard in (shard for split in splits for shard in split["shards"]):
        sha.update((manifest.parent / shard["path"]).read_bytes())
    return sha.hexdigest()


LIBRARY = """
import sys, time
from benchmarks.prepare import ALONE_MB, BATCH, MB, documents
from llmtrain.data.tokenizer import load
from pathlib import Path
tokenizer = load(Path(sys.argv[1]))
texts, batches, size = list(documents(ALONE_MB * MB, seed=2)), [[]], 0
for text in texts:
    batches[-1].append(text)
    size += len(text)
    if size > BATCH:
        batches.append([])
        size = 0
begun = time.perf_counter()
for batch in batches:
    for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
        encoding.ids
print(sum(len(text.encode()) for text in texts) / MB / (time.perf_counter() - begun))
"""


def library_rate(tokenizer: Path, threads: int) -> float:
    """Megabytes a second of the tokenizers library's own batches."""
    told = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    words = [sys.executable, "-c", LIBRARY, str(tokenizer)]
    done = subprocess.run(words, env=os.environ | told, capture_output=True, check=True)
    return float(done.stdout)


def page(found: dict[str, Any]) -> str:
    lines = [f"# Preparing a text: {cpu_name()}, {num_cores()} cores, {date.today()}", ""]
    lines += ["`python -m benchmarks.prepare`", "", "| | seconds | MB/s | memory |"]
    lines += ["|---|--:|--:|--:|"]
    for name, row in found["rows"].items():
        rate = f"{row['mb_per_second']:.2f}" if "mb_per_second" in row else ""
        memory = f"{row['peak_mib']:,.0f} MiB" if "peak_mib" in row else ""
        lines.append(f"| {name} | {row['seconds']:.0f} | {rate} | {memory} |")
    said = "the same bytes" if found["same_bytes"] else "OTHER BYTES"
    lines += ["", f"One process and two that were killed three times gave {said}.", ""]
    rates = (f"{rate:.2f} MB/s on {name}" for name, rate in found["library_mb_per_second"].items())
    lines += [f"The tokenizers library by itself: {', '.join(rates)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
