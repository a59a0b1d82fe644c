"""Predicted beside measured: how far are simulated steps and compiled peaks from runs that others published?

Command:  python benchmarks/validate.py FILE.csv --json OUT.json --md benchmarks/validation.md
Needs:    the compilers of the rows' hardware (aot-tpu, aot-cuda, aot-rocm); rows without theirs say so.
"""

import sys

from tsp_jax.tools.validate import main

if __name__ == "__main__":
    sys.exit(main())
