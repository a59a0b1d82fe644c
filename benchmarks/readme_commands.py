"""Runs every command of README in an empty environment, and writes the transcript as a note.

The script clones this repository into an empty folder, with an empty home folder and an empty virtual environment, and
runs every shell and Python block of the clone's README in order. It writes each command, its exit code and seconds, and
what it printed, shortened. It ends with exit code 1 at the first command that fails.

Command:  python benchmarks/readme_commands.py benchmarks/readme_commands.md
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED_ON = ("PIP_", "SSL_", "REQUESTS_", "LANG", "LC_", "HTTP", "http")
"""beginnings of names of environment variables without which packages may not be found"""
FIRST, LAST = 16, 6
"""lines of output that are kept of a command; of an installation, the last one"""


def commands(readme: str) -> Iterator[list[str]]:
    """Each command as the words of a process: a line of a shell block, or a whole Python block."""
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", readme, re.DOTALL):
        if language == "python":
            yield ["python", "-c", block]
            continue
        for line in block.replace("\\\n", " ").splitlines():
            yield ["bash", "-c", re.sub(r"\s+", " ", line.partition("  #")[0]).strip()]


def shown(words: list[str]) -> str:
    """A command as the transcript shows it."""
    if words[0] == "bash":
        return f"$ {words[2]}"
    first = next(line for line in words[2].splitlines() if line.strip())
    return f"$ python  # the block that begins: {first}"


def kept(words: list[str], output: str) -> str:
    """The first and the last lines, without control sequences, what was overwritten, and empty lines."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    lines = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
    lines = [line if len(line) <= 160 else f"{line[:160]} ..." for line in lines if line.strip()]
    if words[-1].startswith("pip install"):
        return "\n".join(lines[-1:])
    return "\n".join(lines if len(lines) <= FIRST + LAST else [*lines[:FIRST], "...", *lines[-LAST:]])


def timed(words: list[str], clone: Path, env: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs a command in the clone, says how it ended, and returns its seconds too."""
    print(shown(words), flush=True)
    began = time.perf_counter()
    done = subprocess.run(
        words, cwd=clone, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    seconds = time.perf_counter() - began
    print(f"  exit code {done.returncode}, {seconds:.0f} s", flush=True)
    return done, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="note to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone, home, environment = (Path(folder) / name for name in ("tsp_jax", "home", "venv"))
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        env = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        env |= {"HOME": str(home), "PATH": f"{environment}/bin:/usr/bin:/bin", "COLUMNS": "130"}
        version = subprocess.run(["git", "-C", clone, "log", "-1", "--format=%h, %cs"], capture_output=True, text=True)
        lines, failed, whole = [], False, time.perf_counter()
        for words in commands((clone / "README.md").read_text()):
            done, seconds = timed(words, clone, env)
            output = kept(words, done.stdout.replace(folder, "/tmp/empty"))
            lines += ["```text", shown(words), *([output] if output else []), "```", ""]
            lines += [f"Exit code {done.returncode}, {seconds:.0f} s.", ""]
            if failed := done.returncode != 0:
                break
        total = time.perf_counter() - whole
        head = [
            "# README's commands, run in an empty environment", "",
            "Question: do they lead from a clone to a trained byte model, a fine-tuned SmolLM2 and a report on",
            "8 x MI300X, in an empty environment?", "",
            f"- Version: {version.stdout.strip()}; Python {sys.version.split()[0]}; {os.cpu_count()} cores",
            "- Command: `python benchmarks/readme_commands.py benchmarks/readme_commands.md`, which wrote this note",
            f"- {'Stopped at a command that failed' if failed else 'Every command ended with exit code 0'}; "
            f"{total / 60:.0f} minutes in all, installations included", "",
            "Of each command the first and the last lines are shown.", "",
        ]  # fmt: skip
        arguments.out.write_text("\n".join([*head, *lines]).rstrip() + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
