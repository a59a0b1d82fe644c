"""The command tsp-export, from a clone: write the model of a run as a Hugging Face folder.

python scripts/export.py runs/mine models/mine
python scripts/export.py runs/mine models/mine-100 --step 100 --dtype bfloat16 --mesh tsp=8 --cpu-devices 8
"""

from tsp_jax.tools.export import main

if __name__ == "__main__":
    main()
