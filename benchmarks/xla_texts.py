"""Reads every program text in XLA's own tests, and holds products and collectives to XLA's own count.

``python benchmarks/xla_texts.py CHECKOUT [--ref REF] [--json FILE]`` takes a checkout or a bare git directory of
openxla/xla. Each text is read twice: as it is written, and as XLA prints it, marked as scheduled, so that its peak and
timeline are computed too. A text has ten seconds of CPU time; a process that a text ends is replaced.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from xla_count import GEMM, PRODUCTS, ask_xla

SINGLE = 1e-6
"""XLA counts in single precision"""
LIMIT_S = 10
"""of CPU time, since other work may share the machine"""
RAW = re.compile(r'R"(\w*)\((.*?)\)\1"', re.DOTALL)
SEPARATOR = re.compile(r"^(?://)?\s*-----+.*$|^(?=HloModule\s)", re.MULTILINE)


def texts(checkout: str, ref: str) -> list[tuple[str, str]]:
    """(file:number, text) of every program in sources and files of a checkout, each text once."""
    git = ["git", "-C", checkout]
    names = ["*.cc", "*.h", "*.hlo", "*.py"]
    files = subprocess.run([*git, "grep", "-lI", "HloModule", ref, "--", *names], capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    for file in files.split():
        content = subprocess.run([*git, "show", file], capture_output=True, check=True).stdout.decode(errors="replace")
        blocks = [content] if file.endswith(".hlo") else [match[2] for match in RAW.finditer(content)]
        parts = [part.strip() for block in blocks for part in SEPARATOR.split(block)]
        for number, part in enumerate(part for part in parts if part.startswith("HloModule")):
            found.setdefault(part + "\n", f"{file.partition(':')[2]}:{number}")
    return [(name, text) for text, name in found.items()]


def read(text: str) -> dict:
    """Products and collectives by the inspector; "refused" or "traceback" with the reason."""
    from rich.console import Console

    from tsp_jax import inspect
    from tsp_jax.errors import ConfigError
    from tsp_jax.hardware.devices import HARDWARE
    from tsp_jax.inspect.flops import product_flops
    from tsp_jax.inspect.platforms import platforms_of_text
    from tsp_jax.inspect.render import show

    try:
        report = inspect.report(text)
        fits = platforms_of_text(report.module) or ("rocm", "tpu")
        for target in [name for name, hardware in HARDWARE.items() if hardware.platform in fits]:
            with contextlib.suppress(ConfigError):  # a target may not have as many devices
                report = inspect.report(text, target=target, record=True)
        json.dumps(report.to_json())
        show(report, Console(file=io.StringIO()))
        module, products = report.module, {}
        for i, _ in module.walk(fusions=True):
            if i.opcode in PRODUCTS or (i.opcode == "custom-call" and GEMM.search(i.custom_call_target)):
                products[f"{i.computation}/{i.name}"] = product_flops(module.computations[i.computation], i)
        collectives = {f"{c.computation}/{c.name}": [c.op, c.bytes] for c in report.collectives}
        return {"products": products, "collectives": collectives}
    except ConfigError as error:
        assert "\n" not in str(error), error
        return {"refused": str(error)}
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.name}:{frame.lineno}"
        return {"traceback": f"{type(error).__name__} in {where}: {error}"[:200]}


def worker(job: str, file: str, start: int) -> None:
    """Runs a job on each text of a file from a number on; a line of JSON each. The timer ends the process."""
    run = {"xla": ask_xla, "read": read}[job]
    run("HloModule m\n\nENTRY e {\n  ROOT p = f32[] parameter(0)\n}\n")  # import before the clock starts
    for text in json.loads(Path(file).read_text())[start:]:
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        begin = time.process_time()
        result = run(text)
        seconds = time.process_time() - begin
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**result, "seconds": seconds, "peak_mb": peak}), flush=True)


def run_all(job: str, some: list[str]) -> Iterator[dict]:
    """Results of a job on each text, in order; a text that kills its process, or takes too long, says so."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "texts.json")
        file.write_text(json.dumps(some))
        done = 0
        while done < len(some):
            command = [sys.executable, __file__, "--worker", job, str(file), str(done)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                assert process.stdout
                for line in process.stdout:
                    yield json.loads(line)
                    done += 1
            if done < len(some):
                code = process.returncode
                died = f"over {LIMIT_S} s" if code == -signal.SIGPROF else f"process died with {code}"
                yield {"traceback": died, "seconds": 0.0, "peak_mb": 0.0}
                done += 1


def reason(text: str) -> str:
    """A refusal without what is particular to one text."""
    text = re.sub(r"'[^']*'|\[[^\]]*\]|\{[^}]*\}", "...", text)
    text = re.sub(r"(computation|instruction|shape|parameter|operand|in) [\w.\-%]+", r"\1 X", text)
    return re.sub(r"\d+", "N", text)[:150]


def compare(ours: dict, theirs: dict, kind: str) -> tuple[int, list[str]]:
    """(number of instructions that both count, lines on those that differ); XLA also lists some that never run."""
    found = {key: value if kind == "products" else value[1] for key, value in ours[kind].items()}
    both = [key for key in theirs[kind] if key in found]
    wrong = [key for key in both if abs(found[key] - theirs[kind][key]) > SINGLE * found[key]]
    return len(both), [f"{key}: {found[key]} here, {theirs[kind][key]} by XLA" for key in wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout")
    parser.add_argument("--ref", default="HEAD")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    found = texts(options.checkout, options.ref)
    print(f"{len(found)} texts, each once")
    theirs = list(run_all("xla", [text for _, text in found]))
    print(f"XLA reads {sum('printed' in each for each in theirs)}")
    written = list(run_all("read", [text for _, text in found]))
    printed = list(run_all("read", [each.get("printed", "HloModule") for each in theirs]))
    rows = [
        {"name": name, "text": text, "xla": a, "written": b, "printed": c if "printed" in a else {}}
        for (name, text), a, b, c in zip(found, theirs, written, printed, strict=True)
    ]
    if options.json:
        Path(options.json).write_text(json.dumps(rows))
    summary(rows)


def summary(rows: list[dict]) -> None:
    """Prints the counts."""
    for form in ("written", "printed"):
        some = [row[form] for row in rows if row[form]]
        tally = collections.Counter(next((k for k in ("refused", "traceback") if k in each), "read") for each in some)
        slow, large = (max(each[key] for each in some) for key in ("seconds", "peak_mb"))
        print(f"\nas {form}: {len(some)} texts, {dict(tally)}, longest {slow:.2f} s, largest {large:.0f} MB")
        for kind in ("traceback", "refused"):
            for why, number in collections.Counter(reason(each[kind]) for each in some if kind in each).most_common(40):
                print(f"  {number:5} {kind}: {why}")
    for kind in ("products", "collectives"):
        programs = agree = instructions = differ = 0
        lines = []
        for row in rows:
            if "products" in row["printed"]:
                both, wrong = compare(row["printed"], row["xla"], kind)
                programs, agree = programs + bool(both), agree + (bool(both) and not wrong)
                instructions, differ = instructions + both, differ + len(wrong)
                lines += [f"{row['name']} {line}" for line in wrong]
        print(f"\n{kind}: {agree} of {programs} programs agree, {instructions - differ} of {instructions} instructions")
        print(*itertools.islice(lines, 100), sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
