"""The command tsp-inspect, from a clone: compile a step for hardware that need not be present, and inspect it.

python scripts/inspect_hlo.py llama_7b --seq-len 131072 --batch 1 --layout tsp --mesh data=1,tsp=8 --target mi300x:8
python scripts/inspect_hlo.py OUT.hlo --target mi300x:8 --mesh data=1,tsp=8      # the text of a compiled program
"""

from tsp_jax.tools.inspect import main

if __name__ == "__main__":
    main()
