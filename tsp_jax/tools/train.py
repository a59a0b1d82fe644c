"""The command tsp-train."""

from tsp_jax.config import Config
from tsp_jax.tools import cli
from tsp_jax.training import trainer


def train(name: str, config: Config, optimizer: cli.Optimizer) -> None:
    """Trains a configuration, with its own optimizer if there is one."""
    trainer.train(config, name, optimizer)


def main() -> None:
    """Runs the command."""
    about = "Train a configuration, or resume the run in its working directory."
    cli.main(train, about=about, needs_output=False)  # metrics.jsonl has what is printed
