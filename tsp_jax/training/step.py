"""One optimizer step as a jitted function of global arrays, and the shardings of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from tsp_jax.config import Config
from tsp_jax.layout import Placement, num_ranks
from tsp_jax.models.lora import split_adapters
from tsp_jax.models.transformer import Transformer, make_merge
from tsp_jax.ops.router import RouterSums
from tsp_jax.stored import NoPadding, paddings
from tsp_jax.training.data import Batch
from tsp_jax.training.optimizer import Chosen, Optimizer, choose_optimizer
from tsp_jax.training.optimizer_table import Logical
from tsp_jax.training.positions import sum_by_position
from tsp_jax.training.safety.finite import update_if_finite
from tsp_jax.training.selection_bias import with_selection_bias


class TrainState(NamedTuple):
    """The state of a run between steps."""

    step: Any
    """[] int32, number of steps done"""
    params: Any
    """float32 master weights that are trained, padded to their stored shapes"""
    opt_state: Any
    frozen: dict
    """all other weights, in `lora.base_dtype`; empty without LoRA"""

    @property
    def weights(self) -> dict:
        """All weights of the model."""
        return {**self.frozen, **self.params}


class StepMetrics(NamedTuple):
    """Metrics of one step, scalars; those of routers are arrays."""

    loss: jax.Array
    """mean negative log-likelihood over the labels, nats per token"""
    grad_norm: jax.Array
    """global norm of the gradient before clipping"""
    learning_rate: jax.typing.ArrayLike
    """NaN if the user's own optimizer does not report it (`injected_learning_rate`)"""
    tokens: jax.Array
    """number of tokens in the batch that have a label"""
    router: RouterSums | tuple[()] = ()
    """of the layers' routers, each [L, ...], the mean over micro-batches; () without experts"""


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """The functions of a run, jitted but not compiled, and trees that describe its state."""

    init: Callable[[], TrainState]
    """() -> the state of step 0, sharded"""
    step: Any
    """jitted (state, batch) -> (state, StepMetrics); a batch is [a, B / a, S], `a` micro-batches; donates the state"""
    evaluate: Any
    """jitted (all weights, batch [1, B, S]) -> (sums of negative log-likelihoods, numbers of labels), each [P] by
    position: `position_buckets`"""
    abstract_state: TrainState
    """shapes, dtypes and shardings of the state"""
    paddings: TrainState
    """for each array of the state, the object that converts it between its logical and its stored form"""
    batch_sharding: NamedSharding
    """sharding of a batch [a, B / a, S] of `a` micro-batches"""

    def lower_step(self, config: Config) -> jax.stages.Lowered:
        """Lowers the step for batches of a configuration."""
        batch = self.abstract_batch((config.accumulate, config.batch // config.accumulate, config.seq_len))
        return self.step.lower(self.abstract_state, batch)

    def abstract_batch(self, shape: tuple[int, int, int]) -> Batch:
        """Returns an abstract batch, to compile for."""
        array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        return Batch(array, array, array, array)


def make_program(config: Config, placement: Placement, optimizer: Optimizer = None) -> TrainProgram:
    """Builds the functions of a training run; compiles nothing.

    Raises:
      ConfigError: `optimizer` is not an optax.GradientTransformation.
    """

    def make_model(seed: int | jax.Array) -> Transformer:
        return Transformer(
            config.model, placement=placement, stream=config.stream, dtype=jnp.dtype(config.compute_dtype),
            remat=config.remat, grad_dtype=config.grad_dtype, token_order=config.data.order, adapters=config.lora,
            rngs=nnx.Rngs(params=seed),
        )  # fmt: skip

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(0)))
    model_of = make_merge(graphdef, abstract)
    logical = Logical(paddings(abstract), nnx.to_pure_dict(abstract))
    chosen = choose_optimizer(config.optimizer, config.steps, optimizer, logical)
    shardings, pads, moments = _state_trees(abstract, chosen, placement, config.optimizer.zero1)

    def init() -> TrainState:
        params, frozen = split_adapters(nnx.to_pure_dict(nnx.state(make_model(config.seed))))
        frozen = jax.tree.map(lambda weight: weight.astype(config.lora.base_dtype), frozen)
        return TrainState(jnp.zeros((), jnp.int32), params, chosen.transformation.init(params), frozen)

    def evaluate(weights: dict, batch: Batch):
        batch = jax.tree.map(lambda x: x[0], batch)
        return sum_by_position(model_of(weights).token_losses(batch).nll_Bt, batch.labels, batch.positions)

    step = _make_step(config, model_of, chosen, shardings.params, moments)
    batch_sharding = placement.sharding(None, "batch", "sequence")
    abstract_state = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        jax.eval_shape(init), shardings,
    )  # fmt: skip
    return TrainProgram(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, in_shardings=(shardings, batch_sharding), out_shardings=(shardings, None)),
        evaluate=jax.jit(evaluate, in_shardings=(shardings.weights, batch_sharding)),
        abstract_state=abstract_state, paddings=pads, batch_sharding=batch_sharding,
    )  # fmt: skip


def _make_step(
    config: Config, model_of: Callable[[dict], Transformer], optimizer: Chosen, shardings: dict, moments: dict
):
    """Returns the step function (state, batch) -> (state, metrics).

    `shardings` are those of the parameters, `moments` those of the parameters' moments.
    """

    def loss(params: dict, frozen: dict, micro: Batch, num_labels: jax.Array):
        model = model_of({**frozen, **params})
        (nll_BT, lse_BT), router = model.losses(micro)
        nll = nll_BT.sum() / num_labels
        router = jax.tree.map(lambda sums: sums / config.accumulate, router)
        total = nll + config.z_loss * (lse_BT * lse_BT).sum() / num_labels + model.router_loss(router)
        return total, (nll, router)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        num_labels = (batch.labels >= 0).sum(dtype=jnp.float32)
        gradient, num_labels_or_1 = jax.grad(loss, has_aux=True), jnp.maximum(num_labels, 1.0)
        grads, (nll, router) = _accumulate(
            lambda micro: gradient(state.params, state.frozen, micro, num_labels_or_1), batch
        )
        grads = lax.with_sharding_constraint(grads, moments)
        updates, opt_state = optimizer.transformation.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = with_selection_bias(params, state.params, router, config.model.experts.bias_rate)
        grad_norm = optax.tree.norm(grads)
        params, opt_state = update_if_finite(nll, grad_norm, (params, opt_state), (state.params, state.opt_state))
        # With ZeRO-1 each device chooses between new and old weights for its shard of the moments, and then gathers. A
        # choice after that would read whole old weights, and so keep both (30.5 GB instead of 24.8; 8 layers of
        # Qwen3-8B, dp on 8 x H100, jax 0.10.2).
        params = lax.optimization_barrier(lax.with_sharding_constraint(params, moments))
        params = lax.with_sharding_constraint(params, shardings)
        learning_rate = optimizer.learning_rate(state.step, opt_state)
        metrics = StepMetrics(nll, grad_norm, learning_rate, num_labels, router)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def _accumulate(gradient: Callable[[Batch], tuple[dict, Any]], batch: Batch) -> tuple[dict, Any]:
    """Sums (gradients, losses) over the micro-batches [a, ...], one at a time.

    All of them run in the loop. With the first one before it, a loop over the second is no loop to the compiler, which
    makes room for what both keep at once: 26.7 GB instead of 17.4 (8 layers of Qwen3-8B on 8 x H100, fsdp, remat none,
    two micro-batches of 8 sequences of 1 K tokens a device; jax 0.10.2).
    """
    first = jax.tree.map(lambda x: x[0], batch)
    if len(batch.tokens) == 1:
        return gradient(first)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, gradient(micro)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, first))
    return lax.scan(add, zeros, batch)[0]


# ------------------------------------------------------------------------------------------------ shardings


def _state_trees(
    abstract: nnx.State, optimizer: Chosen, placement: Placement, zero1: bool
) -> tuple[TrainState, TrainState, dict]:
    """Returns the shardings of the state, the paddings of the state, and the shardings of the parameters' moments.

    An array of the optimizer that belongs to a parameter and has its shape is sharded as a moment and padded like the
    parameter, unless the state is of logical arrays. Any other array (counts, factored moments) is replicated and not
    padded.
    """
    params, frozen = split_adapters(nnx.to_pure_dict(abstract))
    pads, frozen_pads = split_adapters(paddings(abstract))
    shardings, frozen_shardings = (jax.tree.map(lambda param: param.sharding, tree) for tree in (params, frozen))
    moments = jax.tree.map(lambda param: _moment_sharding(param, placement) if zero1 else param.sharding, params)
    opt_state = jax.eval_shape(optimizer.transformation.init, params)
    replicated = NamedSharding(placement.mesh, PartitionSpec())
    opt_pads = jax.tree.map(lambda _: NoPadding(), params) if optimizer.logical_state else pads

    def like_params(tree: dict, other: Any) -> Any:
        def choose(array, param, leaf):
            if isinstance(array, optax.MaskedNode):  # a parameter that optax.masked leaves out
                return array
            return leaf if array.shape == param.shape else other

        return optax.tree_map_params(
            optimizer.transformation, choose, opt_state, params, tree,
            transform_non_params=lambda _: other, is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )  # fmt: skip

    return (
        TrainState(replicated, shardings, like_params(moments, replicated), frozen_shardings),
        TrainState(NoPadding(), pads, like_params(opt_pads, NoPadding()), frozen_pads),
        moments,
    )


def _moment_sharding(param: jax.ShapeDtypeStruct, placement: Placement) -> NamedSharding:
    """The sharding of a parameter's moments with ZeRO-1.

    It is the parameter's sharding, plus the batch axes over which the parameter is replicated. These shard the last
    unsharded dim that they divide, if there is one.
    """
    spec = [*param.sharding.spec, *[None] * (param.ndim - len(param.sharding.spec))]
    used = {name for names in spec for name in ((names,) if isinstance(names, str) else names or ())}
    copies = tuple(name for name in placement.layout.batch if name not in used)
    for dim in reversed(range(param.ndim)):
        if spec[dim] is None and param.shape[dim] % num_ranks(copies, placement.mesh.shape) == 0:
            spec[dim] = copies or None
            break
    return NamedSharding(placement.mesh, PartitionSpec(*spec))
