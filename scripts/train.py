"""The command tsp-train, from a clone: ``python scripts/train.py tiny --layout tsp --mesh data=1,tsp=8``."""

from tsp_jax.tools.train import main

if __name__ == "__main__":
    main()
