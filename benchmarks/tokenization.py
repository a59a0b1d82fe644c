"""Text -> token ids: rate beside the package `tokenizers` alone, peak memory, a build that is killed, two at once.

``python benchmarks/tokenization.py models/smollm2 --mb 1000 --folder /tmp/tokenization``. The text is the standard
library's sources, many times, each time with other names. Rates are taken on parts of it in turns, so that other load
on the machine affects both alike. (The file is not called tokenize.py, which is a module of the standard library.)
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import tyro

from tsp_jax.text.shards import SHARD

PART_MB = 4
"""size of a part on which rates are taken"""
LOAD = """
import json, resource, sys, time
from tsp_jax.config import DataConfig
from tsp_jax.text import shards
from tsp_jax.training.corpus import load_corpus
files, cache, tokenizer, shard = sys.argv[1:]
shards.SHARD = int(shard)
start, before = time.perf_counter(), time.process_time()
corpus = load_corpus(DataConfig(files=files, cache_dir=cache, tokenizer=tokenizer), 2**31, "train")
used = resource.getrusage(resource.RUSAGE_CHILDREN)
answer = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - before + used.ru_utime + used.ru_stime}
print(json.dumps(answer | {"tokens": len(corpus.tokens), "documents": len(corpus.starts), "digest": corpus.digest}))
"""


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of the command."""

    tokenizer: tyro.conf.Positional[str]
    """folder with tokenizer.json"""
    mb: int = 1000
    """text to tokenize, in 10^6 bytes"""
    rounds: int = 5
    """parts on which rates are taken; 0: none"""
    folder: str = "/tmp/tokenization"
    """where text and caches are written"""


def documents() -> Iterator[str]:
    """Endlessly many documents."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = [path.read_text(errors="replace") for path in paths if "-packages" not in str(path)]
    for copy in range(10**6):
        for text in texts:
            yield f"# copy {copy}\n" + text.replace("self", f"this_{copy}")


def write(source: Iterator[str], path: Path, size: int) -> None:
    """Writes documents as JSON lines, `size` bytes or more."""
    with path.open("w") as file:
        while file.tell() < size:
            file.write(json.dumps({"text": next(source)}) + "\n")


def alone(path: Path, tokenizer: str) -> tuple[float, float]:
    """(seconds, processor seconds) that `encode_batch` takes for the texts of a file."""
    texts = [json.loads(line)["text"] for line in path.open()]
    made = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    start, before = time.perf_counter(), time.process_time()
    made.encode_batch(texts)
    return time.perf_counter() - start, time.process_time() - before


def load(files: Path, cache: Path, args: Args) -> subprocess.Popen:
    """A process that loads a corpus, in about ten shards (at 1 GB, of the size that is usual)."""
    shard = min(SHARD, args.mb * 10**6 // 32)
    command = [sys.executable, "-c", LOAD, str(files), str(cache), args.tokenizer, str(shard)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def tree_bytes(root: int) -> int:
    """Proportional memory of a process and those it has started."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    tree, total = {root}, 0
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    for one in tree:
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:
            continue
    return total


def watch(processes: list[subprocess.Popen], until=lambda: False) -> int:
    """Waits for processes to end, or for `until`; returns the largest peak of their memory."""
    peak = 0
    while any(process.poll() is None for process in processes) and not until():
        peak = max([peak, *(tree_bytes(process.pid) for process in processes)])
        time.sleep(0.5)
    return peak


def rates(args: Args, folder: Path) -> None:
    """Prints the rate beside that of the package alone, on parts of the text in turns."""
    ratios, cpu_ratios = [], []
    source = documents()
    for number in range(args.rounds):
        path = folder / f"part{number}.jsonl"
        write(source, path, PART_MB * 10**6)
        first = alone(path, args.tokenizer)
        ours = json.loads(load(path, folder / "rates", args).communicate()[0])
        second = alone(path, args.tokenizer)
        package, package_cpu = ((a + b) / 2 for a, b in zip(first, second, strict=True))
        ratios.append(package / ours["s"])
        cpu_ratios.append(package_cpu / ours["cpu_s"])
        print(f"part {number}: {PART_MB / ours['s']:.2f} MB/s, tokenizers {PART_MB / package:.2f}, "
              f"ratio {ratios[-1]:.2f}, of processor time {cpu_ratios[-1]:.2f}")  # fmt: skip
    print(f"median ratio {statistics.median(ratios):.2f}, of processor time {statistics.median(cpu_ratios):.2f}")


def killed_and_shared(args: Args, folder: Path) -> None:
    """Kills a build after two shards, then lets two processes finish it."""
    source = documents()
    for number in range(-(-args.mb // 100)):
        write(source, folder / f"text{number:02}.jsonl", min(100, args.mb) * 10**6)
    files, cache = folder / "text*.jsonl", folder / "cache"

    def records() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.partial/?????.json")}

    start = time.perf_counter()
    first = load(files, cache, args)
    peak = watch([first], until=lambda: len(records()) >= 2)
    first.kill()
    first.wait()
    before = records()
    print(f"killed after {time.perf_counter() - start:.0f} s with {len(before)} shards; peak {peak / 1e6:,.0f} MB")
    both = [load(files, cache, args) for _ in range(2)]
    peak = watch(both)
    answers = [json.loads(process.communicate()[0]) for process in both]
    after = {path.name: path.stat().st_mtime_ns for path in cache.glob("*/?????.json")}
    print(f"two at once: {answers}; peak of one {peak / 1e6:,.0f} MB; {len(after)} shards")
    print(f"shards of the killed process kept: {all(after[name] == when for name, when in before.items())}")
    print(f"same corpus: {answers[0]['digest'] == answers[1]['digest']}")


def main(args: Args) -> None:
    """Runs the benchmark."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    folder = Path(args.folder)
    folder.mkdir(parents=True)
    if args.rounds:
        rates(args, folder)
    killed_and_shared(args, folder)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
