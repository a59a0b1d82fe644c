"""A mixture of experts as a layer, in place of an MLP.

Dims: B batch, T tokens, D model, F ffn of an expert, E experts; upper case is the full dimension.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tsp_jax.config import Activation, ExpertsConfig, Remat, StreamConfig
from tsp_jax.cost.traffic import experts_traffic, repeats_mlp
from tsp_jax.errors import ConfigError
from tsp_jax.layout import Placement, num_ranks
from tsp_jax.nn.layer import Layer
from tsp_jax.nn.mlp import MLP
from tsp_jax.ops.experts import ExpertBiases, experts
from tsp_jax.ops.grouped import choose_grouped
from tsp_jax.ops.router import RouterSums, route
from tsp_jax.stored import ExpertBiasPadding, ExpertPadding


class Experts(Layer):
    """A mixture of experts: a router chooses k of E gated MLPs for each token; their outputs are added with weights.

    No token is dropped. On folded axes, which shard the experts, experts move past tokens (`mlp_movement` gather or
    ring), and a device does the same work whatever the router chooses; or tokens past experts (activations), and it
    does the work of its own experts. `auto` takes whichever receives fewer bytes. Tensor axes shard the rows of each
    expert. If E does not divide over the folded ranks, it is padded with experts that no token chooses.

    The layer adds no loss: a caller multiplies `RouterSums.balance` and `z` with `config.balance_loss` and `z_loss`, as
    `tsp_jax.models.transformer.Transformer.router_loss` does. If `config.bias_rate` is not 0, the layer has a parameter
    `selection_bias` without a gradient, which a training step moves (`tsp_jax.training.selection_bias`).

    Args:
      d_model: D.
      d_ff: F, of each expert.
      config: numbers of experts, the rule of the router, and which biases there are, 0 at first. It must have experts.
      placement: layout and mesh.
      stream: movement (`mlp_movement`) and bucket size.
      activation: as in `MLP`.
      norm_follows: as in `MLP`.
      remat: as in `MLP`.
      init_std: standard deviation of the router's weights, and of the initial gate and up projections.
      out_std: the same for the down projections; init_std if None.
      dtype: compute dtype of experts; parameters are float32, and so is the router.
      rngs: random number generators; the stream `params` is used.
    """

    dim = "mlp"

    def __init__(
        self, d_model: int, d_ff: int, config: ExpertsConfig, *, placement: Placement,
        stream: StreamConfig = StreamConfig(), activation: Activation = "silu", norm_follows: bool = False,
        remat: Remat = "none", init_std: float = 0.02, out_std: float | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs,
    ):  # fmt: skip
        out_std = init_std if out_std is None else out_std
        self._check_settings(
            d_model=d_model, d_ff=d_ff, config=config, placement=placement, stream=stream, activation=activation,
            norm_follows=norm_follows, remat=remat, init_std=init_std, out_std=out_std, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        if not config.number:
            raise ConfigError("Experts: config.number=0; use MLP, or 1 expert at least")
        super().__init__(placement, stream, dtype)
        self.config, self.activation, self.repeated = config, activation, repeats_mlp(norm_follows, remat)
        whole = num_ranks(placement.layout.expert_axes, placement.mesh.shape)
        self.padding = ExpertPadding(config.number, d_ff, placement.size(self.dim) // whole, whole)
        self.bias_padding = ExpertBiasPadding(self.padding, d_model)
        rows = config.number * d_ff

        def replicated(value: jax.Array) -> nnx.Param:
            return nnx.Param(value, out_sharding=placement.layout.spec(*[None] * value.ndim), mesh=placement.mesh)

        def biases() -> nnx.Param:
            value = self.bias_padding.pad(jnp.zeros((rows,), jnp.float32))
            sharding = {"out_sharding": placement.layout.spec(self.dim, None), "mesh": placement.mesh}
            return nnx.Param(value, **sharding, padding=self.bias_padding)

        self.router = replicated(
            nnx.initializers.normal(init_std)(rngs.params(), (config.number, d_model), jnp.float32)
        )
        self.router_bias = replicated(jnp.zeros((config.number,), jnp.float32)) if config.router_bias else None
        self.selection_bias = replicated(jnp.zeros((config.number,), jnp.float32)) if config.bias_rate else None
        self.w_gate = self._param(rngs, rows, d_model, init_std, self.padding)
        self.w_up = self._param(rngs, rows, d_model, init_std, self.padding)
        self.w_down = self._param(rngs, rows, d_model, out_std, self.padding)
        self.gate_bias, self.up_bias = (biases() if config.biases else None for _ in range(2))
        self.down_bias = replicated(jnp.zeros((config.number, d_model), jnp.float32)) if config.biases else None
        shared = partial(
            MLP, d_model, config.shared * d_ff, placement=placement, stream=stream, activation=activation,
            norm_follows=norm_follows, remat=remat, init_std=init_std, out_std=out_std, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.shared = shared() if config.shared else None

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None = None) -> tuple[jax.Array, RouterSums]:
        """[B, T, D] -> ([B, T, D] in the compute dtype, what the router says about the tokens).

        `real_BT`, bool: tokens that the sums count, without padding; None: all.
        """
        d_model = self.router.shape[-1]
        self._check_x(x_BTD, d_model)
        local_experts = self.padding.stored_experts // self.padding.folded
        stored = 3 * self.padding.stored + (2 * self.bias_padding.stored if self.config.biases else 0)
        stream = self._stream(
            x_BTD.shape, self.stream.mlp_movement, experts_traffic, d_model=d_model, rows=local_experts,
            elements=stored * d_model, stored_rows=stored, per_token=self.config.per_token, repeated=self.repeated,
        )  # fmt: skip
        rule = {name: getattr(self.config, name) for name in ("per_token", "scores", "normalize", "scale")}
        router = partial(route, token_axes=self.placement.layout.tokens, **rule)
        grouped = choose_grouped(
            self.stream.expert_kernel, self.placement.mesh, d_model, self.padding.shard_rows, self.dtype
        )  # fmt: skip
        op = partial(
            experts, num_experts=self.config.number, axes=self.placement.layout.axes(self.dim), stream=stream,
            activation=self.activation, d_ff=self.padding.rows, expert_axes=self.placement.layout.expert_axes,
            grouped=grouped,
        )  # fmt: skip

        def local(x_BtD, real, w_ED, router_biases, weights, biases):
            choices, sums = router(x_BtD, w_ED, **real, **router_biases)
            return op(x_BtD, choices, *weights, biases=biases), sums

        tokens_spec, x_spec, w_spec = self._specs()
        none = self.placement.layout.spec()
        weights = self.w_gate[...], self.w_up[...], self.w_down[...]
        learned = {"bias_E": self.router_bias, "selection_bias_E": self.selection_bias}
        router_biases = {name: bias[...] for name, bias in learned.items() if bias is not None}
        biases = self._biases()
        bias_specs = None if biases is None else ExpertBiases(w_spec, w_spec, none)
        specs = (x_spec, tokens_spec, none, none, w_spec, bias_specs), (x_spec, none)
        real = {} if real_BT is None else {"real_Bt": real_BT}
        arrays = x_BTD.astype(self.dtype), real, self.router[...], router_biases, weights, biases
        y_BTD, sums = self._run(local, *specs, *arrays)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD), sums

    def _biases(self) -> ExpertBiases | None:
        if self.gate_bias is None or self.up_bias is None or self.down_bias is None:
            return None
        return ExpertBiases(self.gate_bias[...], self.up_bias[...], self.down_bias[...])
