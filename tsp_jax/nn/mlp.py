"""The gated MLP as a layer.

Dims: B batch, T tokens, D model, F ffn; upper case is the full dimension.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tsp_jax.config import Activation, Remat, StreamConfig
from tsp_jax.cost.traffic import mlp_traffic, repeats_mlp
from tsp_jax.layout import Placement
from tsp_jax.nn.layer import Layer
from tsp_jax.ops.mlp import mlp
from tsp_jax.stored import RowPadding


class MLP(Layer):
    """Gated MLP.

    An F that does not divide over the ranks is padded with rows of zeros; they get no gradient and change no result.

    Args:
      d_model: D.
      d_ff: F.
      placement: layout and mesh.
      stream: movement and bucket size.
      activation: silu (SwiGLU), gelu (GeGLU) or clamped_swiglu (gpt-oss); see `tsp_jax.ops.mlp.mlp`.
      norm_follows: whether the output goes to a norm, whose backward needs it.
      remat: what backward recomputes of this layer: the output too, for a norm that follows. `auto` counts the bytes
        that this moves when it chooses the movement.
      init_std: standard deviation of the initial gate and up projections.
      out_std: the same for the down projection; init_std if None.
      dtype: compute dtype; parameters are float32.
      rngs: random number generators; the stream `params` is used.
    """

    dim = "mlp"

    def __init__(
        self, d_model: int, d_ff: int, *, placement: Placement, stream: StreamConfig = StreamConfig(),
        activation: Activation = "silu", norm_follows: bool = False, remat: Remat = "none", init_std: float = 0.02,
        out_std: float | None = None, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs,
    ):  # fmt: skip
        out_std = init_std if out_std is None else out_std
        self._check_settings(
            d_model=d_model, d_ff=d_ff, placement=placement, stream=stream, activation=activation,
            norm_follows=norm_follows, remat=remat, init_std=init_std, out_std=out_std, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        super().__init__(placement, stream, dtype)
        self.activation, self.repeated = activation, repeats_mlp(norm_follows, remat)
        self.padding = RowPadding.over(d_ff, placement.size(self.dim))
        self.w_gate = self._param(rngs, d_ff, d_model, init_std, self.padding)
        self.w_up = self._param(rngs, d_ff, d_model, init_std, self.padding)
        self.w_down = self._param(rngs, d_ff, d_model, out_std, self.padding)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D] in the compute dtype."""
        stored, d_model = self.w_up.shape
        self._check_x(x_BTD, d_model)
        stream = self._stream(
            x_BTD.shape, self.stream.mlp_movement, mlp_traffic, d_model=d_model, d_ff=stored,
            repeated=self.repeated, rows=stored // self.placement.size(self.dim), elements=3 * stored * d_model,
        )  # fmt: skip
        axes = self.placement.layout.axes(self.dim)
        op = partial(mlp, axes=axes, stream=stream, activation=self.activation, d_ff=self.padding.rows)
        _, x_spec, w_spec = self._specs()
        weights = self.w_gate[...], self.w_up[...], self.w_down[...]
        return self._run(op, (x_spec, w_spec, w_spec, w_spec), x_spec, x_BTD.astype(self.dtype), *weights)
