"""A Hugging Face folder as the configuration of a run: its sizes, its weights and its tokenizer."""

from pathlib import Path

from tsp_jax.config import Config, DataConfig, OptimizerConfig
from tsp_jax.files import read_json
from tsp_jax.hf.config import read_config

LONGEST = 8192
"""largest default of `seq_len`, in tokens"""
LEARNING_RATE = 2e-5
"""default peak learning rate of weights that are trained already"""


def is_model(folder: str | Path) -> bool:
    """Whether a path is a folder with a `config.json`."""
    return (Path(folder) / "config.json").is_file()


def folder_config(folder: str | Path) -> Config:
    """Returns the configuration that trains the model of a folder on text in its own tokens.

    The defaults suit weights that are trained already: sequences as long as the model's context, of 8,192 tokens at
    most, one per step, and a small learning rate. The weights themselves need not be present.

    Raises:
      ConfigError: `config.json` is broken, or describes a model that is not supported.
    """
    folder = str(folder)
    context = read_json(Path(folder) / "config.json").get("max_position_embeddings")
    length = min(context, LONGEST) if isinstance(context, int) and context > 0 else LONGEST
    return Config(
        model=read_config(folder),
        init_from=folder,
        data=DataConfig(tokenizer=folder),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.0),
        steps=100,
        batch=1,
        seq_len=length,
        workdir=f"runs/{Path(folder).resolve().name}",
    )
