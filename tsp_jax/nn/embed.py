"""The vocabulary table as a layer.

Dims: B batch, T tokens, D model, V vocabulary; upper case is the full dimension.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tsp_jax.config import StreamConfig
from tsp_jax.cost.traffic import Traffic, embed_traffic, loss_traffic
from tsp_jax.layout import Placement
from tsp_jax.nn.layer import Layer
from tsp_jax.ops.cross_entropy import Logits, TokenLosses, cross_entropy
from tsp_jax.ops.embedding import embed
from tsp_jax.stored import RowPadding


class Embed(Layer):
    """A vocabulary table: an embedding of tokens, and an output head with its cross-entropy.

    A vocabulary that does not divide over the ranks is padded with rows of zeros; they get no gradient and change no
    result.

    Args:
      vocab_size: V.
      d_model: D.
      placement: layout and mesh.
      stream: movement and bucket size.
      logits_scale: factor of the products of tokens and rows of the output head.
      logits_softcap: bound c of the absolute logits z, which become ``c tanh(z / c)``; None: no bound.
      init_std: standard deviation of the initial table.
      dtype: compute dtype; the table is float32.
      rngs: random number generators; the stream `params` is used.
    """

    dim = "vocab"

    def __init__(
        self, vocab_size: int, d_model: int, *, placement: Placement, stream: StreamConfig = StreamConfig(),
        logits_scale: float = 1.0, logits_softcap: float | None = None, init_std: float = 0.02,
        dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs,
    ):  # fmt: skip
        self._check_settings(
            vocab_size=vocab_size, d_model=d_model, placement=placement, stream=stream, logits_scale=logits_scale,
            logits_softcap=logits_softcap, init_std=init_std, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        super().__init__(placement, stream, dtype)
        self.logits = Logits(logits_scale, logits_softcap)
        self.padding = RowPadding.over(vocab_size, placement.size(self.dim))
        self.table = self._param(rngs, vocab_size, d_model, init_std, self.padding)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """[B, T] token ids, of any integer dtype -> [B, T, D] in the compute dtype.

        An id outside [0, V) gives a row of zeros, because a device program cannot raise errors. Check ids beforehand.
        """
        self._check_integers("ids_BT", ids_BT, "B", "T")
        tokens_spec, x_spec, w_spec = self._specs()
        op = partial(embed, **self._options(ids_BT.shape, embed_traffic), dtype=self.dtype)
        return self._run(op, (tokens_spec, w_spec), x_spec, ids_BT.astype(jnp.int32), self.table[...])

    def cross_entropy(self, x_BTD: jax.Array, labels_BT: jax.Array) -> TokenLosses:
        """Cross-entropy of each token, with the table as output head, without [B, T, V] logits.

        Labels are next tokens, of any integer dtype; negative labels are ignored. The losses are [B, T] float32: 0
        where the label is ignored, NaN where it is V or more.
        """
        self._check_x(x_BTD, self.table.shape[1])
        self._check_integers("labels_BT", labels_BT, *x_BTD.shape[:2])
        tokens_spec, x_spec, w_spec = self._specs()
        op = partial(cross_entropy, **self._options(labels_BT.shape, loss_traffic), logits=self.logits)
        labels_BT = labels_BT.astype(jnp.int32)
        specs = x_spec, w_spec, tokens_spec
        return self._run(op, specs, tokens_spec, x_BTD.astype(self.dtype), self.table[...], labels_BT)

    def _options(self, shape: Sequence[int], traffic: Callable[..., Traffic]) -> dict[str, Any]:
        """Keyword arguments (axes, stream and V) of an op on tokens [B, T]; `traffic` gives the bytes it moves."""
        stored, d_model = self.table.shape
        stream = self._stream(
            shape, self.stream.vocab_movement, traffic, d_model=d_model, vocab_size=stored,
            rows=stored // self.placement.size(self.dim), elements=stored * d_model,
        )  # fmt: skip
        return {"axes": self.placement.layout.axes(self.dim), "stream": stream, "vocab_size": self.padding.rows}
