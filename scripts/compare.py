"""The command tsp-compare, from a clone: layouts side by side on hardware that need not be present.

python scripts/compare.py llama_7b --seq-lens 16384,131072 --layouts 'tsp:8,tp_sp:2x4,tsp(weights=data+tsp):2x4' \\
    --target mi300x:8 --json OUT.json --csv OUT.csv --png OUT.png
"""

from tsp_jax.tools.compare import main

if __name__ == "__main__":
    main()
