"""What layers share: parameters with sharding metadata, checks of tokens, streams, and the call of an op.

Dims: B batch, T tokens, D model.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import AbstractMesh, PartitionSpec

from tsp_jax.config import StreamConfig
from tsp_jax.cost.traffic import OpSharding, Traffic, choose_movement
from tsp_jax.errors import ConfigError
from tsp_jax.layout import Placement, check_divides
from tsp_jax.nn.arguments import FLOATS, INTEGERS, check_array, check_settings
from tsp_jax.ops.stream import Stream
from tsp_jax.stored import ExpertPadding, HeadPadding, RowPadding


class Layer(nnx.Module):
    """An op on tokens [B, T, ...], with weights [rows, D] that are sharded along one logical dimension."""

    dim: str
    """the logical dimension along which the weights are sharded: heads, mlp or vocab"""

    def __init__(self, placement: Placement, stream: StreamConfig, dtype: jax.typing.DTypeLike):
        self.placement, self.stream, self.dtype = placement, stream, jnp.dtype(dtype)
        placement.check_context()

    @classmethod
    def _check_settings(cls, **settings: Any) -> None:
        check_settings(cls.__name__, **settings)

    def _param(
        self, rngs: nnx.Rngs, rows: int, d_model: int, std: float, padding: HeadPadding | RowPadding | ExpertPadding
    ) -> nnx.Param:
        """A weight with normally distributed rows, and zeros for padding.

        Raises:
          ConfigError: the weight needs values (it is not traced), but the mesh has no devices.
        """
        value = nnx.initializers.normal(std)(rngs.params(), (rows, d_model), jnp.float32)
        if isinstance(self.placement.mesh, AbstractMesh) and not isinstance(value, Tracer):
            raise ConfigError(
                f"{type(self).__name__}: the placement's mesh is a jax.sharding.AbstractMesh, which has no devices; "
                "use a jax.sharding.Mesh, or nnx.eval_shape for shapes"
            )
        return nnx.Param(
            padding.pad(value), out_sharding=self.placement.layout.spec(self.dim, None),
            mesh=self.placement.mesh, padding=padding,
        )  # fmt: skip

    def _run(self, op: Callable, in_specs: Any, out_specs: Any, *args: Any) -> Any:
        """Runs a per-device function on global arrays."""
        try:
            return self.placement.shard_map(op, in_specs, out_specs)(*args)
        except TypeError as error:  # JAX's own message, under jit, comes when the program is compiled
            if "Unhashable" not in str(error) and "forward-mode" not in str(error):
                raise
            name = type(self).__name__
            raise ConfigError(
                f"{name}: forward mode (jax.jvp, jax.jacfwd) is not supported; use jax.grad or jax.vjp"
            ) from None

    def _specs(self) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """PartitionSpecs of arrays [B, T], of arrays [B, T, D], and of weights."""
        spec = self.placement.layout.spec
        return spec("batch", "sequence"), spec("batch", "sequence", None), spec(self.dim, None)

    def _check_x(self, x_BTD: Any, d_model: int) -> None:
        check_array(type(self).__name__, "x_BTD", x_BTD, FLOATS, "B", "T", d_model)
        self._check_divides(x_BTD.shape)

    def _check_integers(self, name: str, array_BT: Any, *shape: int | str) -> None:
        check_array(type(self).__name__, name, array_BT, INTEGERS, *shape)
        self._check_divides(array_BT.shape)

    def _check_divides(self, shape: Sequence[int]) -> None:
        for dim, value in zip(("batch", "sequence"), shape, strict=False):
            check_divides(dim, value, self.placement.size(dim), getattr(self.placement.layout, dim))

    def _sharding(self, shape: Sequence[int]) -> OpSharding:
        return OpSharding.of(
            self.placement.layout, self.placement.mesh.shape, self.dim, batch=shape[0], seq_len=shape[1],
            itemsize=self.dtype.itemsize, grad_itemsize=jnp.dtype(self.stream.grad_dtype).itemsize,
        )  # fmt: skip

    @property
    def _bucket_bytes(self) -> float:
        return self.stream.bucket_mib * 2**20

    def _stream(
        self, shape: Sequence[int], movement: str, traffic: Callable[..., Traffic],
        *, d_model: int, rows: int = 1, elements: int = 0, tokens_may_move: bool = True, **sizes: Any,
    ) -> Stream:  # fmt: skip
        """The stream for tokens [B, T, ...]: `auto` is resolved, and the bucket size converted to bucket counts.

        ``traffic(sharding, movement, **sizes)`` gives the bytes that `auto` compares. `rows` is the number of rows
        of a weight on each device, `elements` the number of elements of the op's weights on all ranks.
        `tokens_may_move` says whether `auto` may choose to move tokens.
        """
        sharding, whole = self._sharding(shape), self.placement.layout.whole_weights
        received = partial(traffic, sharding, d_model=d_model, **sizes)
        # A chunk's product is at most as large as the two buckets in memory. If it is smaller than all tokens, each
        # bucket reads and writes the sum over buckets apart from its product (benchmarks/layouts.md).
        product_bytes = 2 * self._bucket_bytes
        return Stream(
            movement="gather" if whole else choose_movement(movement, received, tokens_may_move),
            buckets=1 if whole else sharding.weight_buckets(rows, elements, self._bucket_bytes),
            token_buckets=sharding.token_buckets(d_model, self._bucket_bytes),
            grad_dtype=self.stream.grad_dtype, product_bytes=product_bytes,
        )  # fmt: skip


def residual_std(init_std: float, num_layers: int) -> float:
    """Initial standard deviation of a projection into the residual stream (GPT-2's scaling)."""
    check_settings("residual_std", init_std=init_std, num_layers=num_layers)
    return init_std / math.sqrt(2 * num_layers)
