"""The command tsp-train."""

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.tools import cli
from tsp_jax.tools.planned import plan_training
from tsp_jax.training import trainer


def train(name: str, config: Config, optimizer: cli.Optimizer) -> None:
    """Trains a configuration, with its own optimizer if there is one.

    Raises:
      ConfigError: the model of a Hugging Face folder is to be trained, and no text is named; else as `trainer.train`.
    """
    if config.init_from and not (config.data.files or config.data.mixture):
        raise ConfigError(
            f"data.files='' names no text to train the model of init_from={config.init_from} on; "
            "use --data.files 'corpus/**/*.txt', or --data.mixture"
        )
    trainer.train(plan_training(config, name, optimizer), name, optimizer)


def main() -> None:
    """Runs the command."""
    about = "Train a configuration, or resume the run in its working directory."
    cli.main(train, about=about, needs_output=False)  # metrics.jsonl has what is printed
