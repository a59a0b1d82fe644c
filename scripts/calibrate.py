"""The command tsp-calibrate, from a clone: measure the devices that are present, and write their rates to a file.

python scripts/calibrate.py --out my-node.json
python scripts/compare.py llama_7b --target h100:8 --hardware my-node.json
"""

from tsp_jax.tools.calibrate import main

if __name__ == "__main__":
    main()
