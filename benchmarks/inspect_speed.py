"""Times reports on generated programs of growing size, each in a process of its own: CPU seconds and peak memory.

    PYTHONPATH=. python benchmarks/inspect_speed.py --megabytes 2.5 5 10 [--forms elementwise updates ...]
    PYTHONPATH=. python benchmarks/inspect_speed.py --files STEP.hlo ...

The forms are those of tests/builders/hlo_growth.py: programs of nothing but one repeated part, which is the worst case.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

from tests.builders.hlo_growth import FORMS
from tsp_jax import inspect
from tsp_jax.inspect.platforms import platforms_of_text
from tsp_jax.inspect.texts import read_program

TARGETS = {"rocm": "mi300x", "cuda": "h100", "cpu": "cpu", "tpu": "v5p"}


def measure(what: str, megabytes: float) -> None:
    """Prints the cost of one report: of a form in so many megabytes, or of a file."""
    if what in FORMS:
        sample = 2000
        text = FORMS[what](round(sample * megabytes * 1e6 / len(FORMS[what](sample))))
    else:
        text = read_program(what)
    begin = time.process_time()
    module = inspect.parse(text)
    parsed = time.process_time() - begin
    target = next((TARGETS[platform] for platform in platforms_of_text(module)), "h100")
    del module
    begin = time.process_time()
    inspect.report(text, target=target).to_json()
    seconds = time.process_time() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    name = what if what in FORMS else Path(what).name
    cells = name, f"{len(text) / 1e6:.2f}", f"{seconds:.1f}", f"{parsed:.1f}", f"{seconds / len(text) * 1e7:.1f}"
    print("| " + " | ".join((*cells, f"{memory / 1e9:.2f}")) + " |", flush=True)


def main() -> None:
    """Runs each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[2.5, 5, 10])
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--files", nargs="*", default=[])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], float(options.one[1]))
        return
    print(
        "| program | MB | CPU s | of which parsing | CPU s per 10 MB | peak GB |\n|---|---|---|---|---|---|", flush=True
    )
    cases = [(file, 0.0) for file in options.files]
    cases += [(form, size) for form in options.forms for size in options.megabytes] if not options.files else []
    for what, size in cases:
        subprocess.run([sys.executable, __file__, "--one", what, str(size)], check=True)


if __name__ == "__main__":
    main()
