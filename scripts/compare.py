"""The command tsp-compare, from a clone: layouts side by side on hardware that need not be present.

python scripts/compare.py llama_7b --seq-lens 16384,131072 --layouts tsp:8,tp:8,sp:8,tp_sp:2x4,tp_sp:4x2,fsdp_cp:8 \\
    --target mi300x:8 --json OUT.json --csv OUT.csv --png OUT.png
"""

from tsp_jax.tools.compare import main

if __name__ == "__main__":
    main()
