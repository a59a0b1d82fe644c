"""Runs every shell command of docs/ in a clone, and writes a note with the exit code and seconds of each.

Needs an installation with the compilers of all platforms and what reads SmolLM2: pip install -e '.[dev,hf,aot-rocm,
aot-cuda,aot-tpu]'. The clone gets the folders that the commands name, corpus/ and models/smollm2. Runs of training take
three steps. What does not run on a CPU is listed with the reason.

Command:  python benchmarks/docs_commands.py benchmarks/docs_commands.md
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from readme_commands import commands, kept, timed

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = {
    "sbatch": "needs a cluster with Slurm",
    "pip install": "installed already",
    "train.py llama_7b": "trains a 7B model",
    "train.py models/smollm2": "takes more than ten minutes; README's fine-tuning is run by readme_commands.py",
    "inspect_hlo.py a.hlo b.hlo": "names programs of one's own",
}
"""part of a command -> why it is not run here; what it says is parsed by tests/test_doc_commands.py"""
FAILS = {"--stream.attention-movement activations --expect 'exposed<=0.1'": 1, "--expect 'step<=1.02x'": 1}
"""end of a command -> the exit code that the document says it has"""
PREPARED = "fetch_smollm2.py models/smollm2"
"""run before all others, which name its folder"""


def prepare(clone: Path, env: dict[str, str]) -> None:
    """Writes the texts that the commands read, and fetches SmolLM2."""
    texts = sorted((clone / "docs").glob("*.md"))
    for place, suffix in (("corpus", ".txt"), ("corpus/wiki", ".txt"), ("corpus", ".py")):
        (clone / place).mkdir(parents=True, exist_ok=True)
        for text in texts:
            (clone / place / text.name).with_suffix(suffix).write_text(text.read_text())
    lines = (json.dumps({"text": text.read_text()}) for text in texts)
    (clone / "corpus" / "all.jsonl").write_text("\n".join(lines) + "\n")
    subprocess.run([sys.executable, "scripts/fetch_smollm2.py", "models/smollm2"], cwd=clone, env=env, check=True)


def lines_of(folder: Path) -> Iterator[tuple[str, str]]:
    """(document, command) of each line of a shell block in docs/, without what is there twice."""
    seen = set()
    for document in sorted(folder.glob("*.md")):
        for words in commands(document.read_text()):
            if words[0] == "bash" and words[-1] and words[-1][0] != "#" and words[-1] not in seen:
                seen.add(words[-1])
                yield document.name, words[-1]


def shortened(command: str) -> str:
    """The command, with three steps if it trains."""
    if not re.search(r"train(_processes)?\.py", command) or "--help" in command:
        return command
    return re.sub(r" --steps \d+", "", command) + " --steps 3"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="note to write")
    parser.add_argument("--only", default="", help="run the commands that contain this text")
    arguments = parser.parse_args()
    rows, failed, began = [], [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "tsp_jax"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        env = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(clone), "COLUMNS": "130",
            "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        prepare(clone, env)
        version = subprocess.run(["git", "-C", clone, "log", "-1", "--format=%h, %cs"], capture_output=True, text=True)
        for document, command in lines_of(clone / "docs"):
            reason = next((why for part, why in NOT_RUN.items() if part in command), "")
            if reason or PREPARED in command or arguments.only not in command:
                if not arguments.only:
                    rows.append(f"| {document} | `{command}` | {reason or '0, before all others'} | |")
                continue
            words = ["bash", "-c", shortened(command)]
            done, seconds = timed(words, clone, env)
            if done.returncode != next((code for end, code in FAILS.items() if command.endswith(end)), 0):
                failed.append(command)
                print(kept(words, done.stdout), flush=True)
            rows.append(f"| {document} | `{words[-1]}` | {done.returncode} | {seconds:.0f} |")
    head = [
        "# The commands of docs/, run", "",
        "Question: do they end as the documents say?", "",
        f"- Version: {version.stdout.strip()}; Python {sys.version.split()[0]}; {os.cpu_count()} cores, no accelerator",
        "- Command: `python benchmarks/docs_commands.py benchmarks/docs_commands.md`, which wrote this note, in an",
        "  installation with `.[dev,hf,aot-rocm,aot-cuda,aot-tpu]`; the texts of corpus/ are copies of docs/",
        f"- {f'{len(failed)} commands failed' if failed else 'Every command ended as it should'}; "
        f"{(time.perf_counter() - began) / 60:.0f} minutes in all", "",
        "| document | command | exit code, or why it was not run | s |", "|---|---|---|---|",
    ]  # fmt: skip
    arguments.out.write_text("\n".join([*head, *rows]) + "\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
