"""Train a configuration, or resume it: ``python scripts/train.py tiny --layout tsp --mesh data=1,tsp=8``."""

from tsp_jax.tools.cli import main
from tsp_jax.training.trainer import train

if __name__ == "__main__":
    main(lambda name, config, optimizer: train(config, name, optimizer))
