"""The command tsp-plan, from a clone: the fastest layout, mesh, remat policy and buckets that fit a target.

python scripts/plan.py llama_7b --target mi300x:8 --seq-len 131072 --out OUT.py --json OUT.json --png OUT.png
"""

from tsp_jax.tools.plan import main

if __name__ == "__main__":
    main()
