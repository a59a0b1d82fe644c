"""Random small models of transformers, their logits, and ours of the same folder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.builders.arrays import zigzag
from tsp_jax.config import ModelConfig
from tsp_jax.hf import weights as hf
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer

LOGITS_TOLERANCE = 1e-4
"""relative; float32 sums in another order, through all layers: 1e-6 is typical"""
SEQ_LEN = 96
SIZES = {
    "vocab_size": 144, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 88, "max_position_embeddings": 256, "rope_theta": 10_000.0, "initializer_range": 0.2,
}  # fmt: skip


def random_model(transformers, family: str, changes: dict):
    """A model of theirs; norm scales and biases are random too."""
    import torch

    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, value in model.named_parameters():
        if "norm" in name:
            value.data = (0 if "Gemma" in family else 1) + 0.3 * torch.randn_like(value)
        elif name.endswith(("bias", "sinks")):
            value.data = 0.5 * torch.randn_like(value)
        elif "gate_up_proj" in name and family == "GptOss":  # gates and ups reach their bounds
            value.data = 0.6 * torch.randn_like(value)
        elif "experts" in name or "router" in name or name.endswith("gate.weight"):
            value.data = 0.2 * torch.randn_like(value)
    return model


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


class Ours:
    """A folder's model on a placement, in float32."""

    def __init__(self, folder: Path, placement: Placement):
        self.config: ModelConfig = hf.read_config(folder)
        self.params, self.placement = hf.load_params(folder, self.config, placement), placement
        model = nnx.eval_shape(
            lambda: Transformer(self.config, placement=placement, dtype=jnp.float32, rngs=nnx.Rngs(0))
        )
        graphdef, self.state = nnx.split(model)
        nnx.replace_by_pure_dict(self.state, self.params)

        @jax.jit
        def logits(state, tokens, positions):
            model = nnx.merge(graphdef, state)
            head = model.head or model.embed
            return head.logits.of(model(tokens, positions, jnp.zeros_like(positions)) @ head.table[...].T)

        self._logits = logits

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[B, S, V] in natural order; computed in zigzag order."""
        order = zigzag(tokens.shape[1], self.placement)
        positions = np.broadcast_to(order.astype(np.int32), tokens.shape)
        placed = jax.device_put(
            (tokens[:, order].astype(np.int32), positions), self.placement.sharding("batch", "sequence")
        )
        return np.asarray(self._logits(self.state, *placed))[:, np.argsort(order)]
