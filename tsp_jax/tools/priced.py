"""A stand-in for an attention kernel that a published run used: declares that kernel's matrix products, and no more.

Programs with it are compiled to be inspected: the timeline then prices attention at the published kernel's rate,
without the traffic or the tiles of a kernel of this package. They must never run: the stand-in writes nothing.

Dims: B batch, T query tokens, S key tokens, K KV heads, G query heads per KV head, H head.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from tsp_jax.ops.kernels import KERNELS, Kernel
from tsp_jax.ops.kernels.kernel import declare_products
from tsp_jax.ops.kernels.mask import Scores

NAME = "priced"
"""the stand-in's name in `stream.kernel`, while `priced_kernel` lasts"""
FORWARD_PRODUCTS = 2
"""products for each pair of query and key: q k and p v"""


@dataclasses.dataclass(frozen=True)
class PricedKernel(Kernel):
    """Declares causal attention's products for each pair of query and key, and computes nothing."""

    arch: str
    """as `arch_of` gives it"""
    kernel: str
    """name of the published kernel: one of `tsp_jax.hardware.rates.ATTENTION_KERNELS`"""
    products: int = 5
    """5 in one kernel (scores, dp, dq, dk, dv); 7 in two kernels, which both repeat scores and dp"""

    @classmethod
    def for_arch(cls, arch: str) -> Self:
        raise NotImplementedError("use priced_kernel")

    def attend(self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, scores=Scores()):
        """Declares ``2 x 2 B T (S + 1) / 2 N H`` operations; see `Kernel.attend`.

        Moves: nothing. Keeps: nothing.
        """
        lse_BTKG = jax.ShapeDtypeStruct(q_BTKGH.shape[:-1], jnp.float32)
        return self._declare("forward", FORWARD_PRODUCTS, (q_BTKGH, k_BSKH, v_BSKH), (q_BTKGH, lse_BTKG))

    def attend_backward(
        self, q_BTKGH, k_BSKH, v_BSKH, queries, keys, delta_BTKG, lse_BTKG, dout_BTKGH, scores=Scores()
    ):
        """Declares ``products x 2 B T (S + 1) / 2 N H`` operations; see `Kernel.attend_backward`.

        Moves: nothing. Keeps: nothing.
        """
        arrays = q_BTKGH, k_BSKH, v_BSKH, dout_BTKGH, delta_BTKG, lse_BTKG
        return self._declare("backward", self.products, arrays, (q_BTKGH, k_BSKH, v_BSKH))

    def _declare(self, direction: Literal["forward", "backward"], products: int, arrays, outputs):
        """Reads `arrays` and makes arrays like `outputs`, of any content."""
        batch, tokens, kv_heads, group, head_dim = arrays[0].shape
        flops = causal_flops(products, batch, tokens, arrays[1].shape[1], kv_heads * group, head_dim)
        varying = jax.typeof(arrays[0]).mat
        made = [_flat(jnp.dtype(x.dtype), x.shape) for x in outputs]
        on_tpu = self.arch.startswith("tpu")
        whole = pl.BlockSpec(memory_space=pl.ANY) if on_tpu else pl.BlockSpec()
        call = pl.pallas_call(
            lambda *refs: None,
            in_specs=[whole] * len(arrays),
            out_specs=[whole] * len(outputs),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in made],
            compiler_params=None if on_tpu else triton.CompilerParams(),
            interpret=self.arch == "cpu",
        )
        with declare_products(self.kernel, direction, head_dim, flops):
            found = call(*(x.reshape(_flat(x.dtype, x.shape)[0]) for x in arrays))
        return tuple(x.reshape(like.shape) for x, like in zip(found, outputs, strict=True))


def _flat(dtype, shape: tuple[int, ...]) -> tuple[tuple[int, ...], jnp.dtype]:
    """(shape, dtype) of an array with its heads flattened, which a TPU stores without padding."""
    return (*shape[:2], math.prod(shape[2:])), dtype


def causal_flops(products: int, batch: int, tokens: int, keys: int, heads: int, head_dim: int) -> float:
    """Operations of attention's products if each query may attend to half of the keys, and itself."""
    return 2.0 * products * batch * tokens * (keys + 1) / 2 * heads * head_dim


@contextlib.contextmanager
def priced_kernel(kernel: str, backward_products: int) -> Iterator[str]:
    """Context manager: the stand-in is a row of the table of kernels; gives its name."""

    class Priced(PricedKernel):
        @classmethod
        def for_arch(cls, arch: str) -> Self:
            return cls(arch, kernel, backward_products)

    KERNELS[NAME] = Priced
    try:
        yield NAME
    finally:
        del KERNELS[NAME]
