"""The gated MLP as a layer.

Dims: B batch, T tokens, D model, F ffn; upper case is the full dimension.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tsp_jax.config import Activation, StreamConfig
from tsp_jax.cost.traffic import mlp_traffic
from tsp_jax.layout import Placement
from tsp_jax.nn.layer import Layer, shard_rows
from tsp_jax.ops.mlp import mlp


class MLP(Layer):
    """Gated MLP: SwiGLU (silu) or GeGLU (gelu).

    Args:
      d_model: D.
      d_ff: F, divisible by the shards of `mlp`.
      placement: layout and mesh.
      stream: movement and bucket size.
      activation: activation of the gate.
      init_std: standard deviation of the initial gate and up projections.
      out_std: the same for the down projection; init_std if None.
      dtype: compute dtype; parameters are float32.
      rngs: stream `params`.
    """

    dim = "mlp"

    def __init__(
        self, d_model: int, d_ff: int, *, placement: Placement, stream: StreamConfig = StreamConfig(),
        activation: Activation = "silu", init_std: float = 0.02, out_std: float | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs,
    ):  # fmt: skip
        out_std = init_std if out_std is None else out_std
        self._check_settings(
            d_model=d_model, d_ff=d_ff, placement=placement, stream=stream, activation=activation, init_std=init_std,
            out_std=out_std, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.rows = shard_rows("d_ff", d_ff, "mlp", placement)
        super().__init__(placement, stream, dtype)
        self.activation = activation
        self.w_gate = self._param(rngs, d_ff, d_model, init_std)
        self.w_up = self._param(rngs, d_ff, d_model, init_std)
        self.w_down = self._param(rngs, d_ff, d_model, out_std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D] in the compute dtype."""
        d_ff, d_model = self.w_up.shape
        self._check_x(x_BTD, d_model)
        stream = self._stream(
            x_BTD.shape, self.stream.mlp_movement, mlp_traffic,
            d_model=d_model, d_ff=d_ff, rows=self.rows, elements=3 * d_ff * d_model,
        )  # fmt: skip
        op = partial(mlp, axes=self.placement.layout.axes(self.dim), stream=stream, activation=self.activation)
        _, x_spec, w_spec = self._specs()
        weights = self.w_gate[...], self.w_up[...], self.w_down[...]
        return self._run(op, (x_spec, w_spec, w_spec, w_spec), x_spec, x_BTD.astype(self.dtype), *weights)
