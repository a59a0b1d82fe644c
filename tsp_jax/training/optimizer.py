"""The optimizer of a run: one from an OptimizerConfig, or an optax transformation of the user's own."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tsp_jax.config import OptimizerConfig
from tsp_jax.errors import ConfigError
from tsp_jax.training.optimizer_table import LOGICAL_STATE, Logical, by_name

Optimizer = optax.GradientTransformation | None
"""the user's own optimizer; None: the one that an OptimizerConfig names"""
ALWAYS_USED = ("zero1",)
"""fields of OptimizerConfig that apply to the user's own optimizer too"""


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by the number of steps done: for step s = 1, 2, ..., `steps`, which has s - 1 steps before it,

        s <= W:  peak s / W    W = max(1, warm-up steps)
        s > W:   final + (peak - final) (1 + cos(pi (s - W) / (steps + 1 - W))) / 2

    So step 1 has a learning rate above 0, step W the peak, and the last step one above the final.
    """
    peak, warmup = config.learning_rate, max(1, warmup_steps(config, steps))
    by_step = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps + 1, peak * config.final_fraction)
    return lambda count: by_step(count + 1)


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Number of warm-up steps: as configured if the run has more steps than that, else a tenth of its steps, or 1."""
    return config.warmup_steps if config.warmup_steps < steps else max(1, steps // 10)


def describe_shorter_warmup(config: OptimizerConfig, steps: int, own: Optimizer) -> str | None:
    """One line if the warm-up is shorter than configured; None if not, or if the user's own optimizer is used."""
    if own is not None or (used := warmup_steps(config, steps)) == config.warmup_steps:
        return None
    return f"optimizer.warmup_steps={config.warmup_steps} is not less than steps={steps}; the warm-up has {used}"


def make_optimizer(config: OptimizerConfig, steps: int, logical: Logical | None = None) -> optax.GradientTransformation:
    """The named optimizer after global-norm clipping.

    Gradients are global arrays, so their norm is the same under every layout. `logical` describes the parameters'
    logical form; None: they are stored in it.
    """
    inner = by_name(config, make_schedule(config, steps), logical or Logical())
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), keep_state_in(config.moments_dtype, inner))


def keep_state_in(dtype: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Stores the state of `inner` that belongs to parameters in `dtype` between steps; updates are computed in float32.

    optax itself can store only the first moment in a narrower dtype.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return inner

    def cast(state: Any, dtype: Any) -> Any:
        return optax.tree_map_params(inner, lambda x: x.astype(dtype), state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


# ------------------------------------------------------------------------------------------------ the user's own


def check_optimizer(own: object) -> None:
    """Raises ConfigError if the user's own optimizer is not an optax.GradientTransformation."""
    if own is not None and not isinstance(own, optax.GradientTransformation):
        raise ConfigError(
            f"optimizer is of type {type(own).__name__}, not an optax.GradientTransformation; "
            "use optimizer = optax.chain(...), or Config(optimizer=OptimizerConfig(...)) for one by name"
        )


class Chosen(NamedTuple):
    """The optimizer of a run."""

    transformation: optax.GradientTransformation
    learning_rate: Callable[[Any, Any], jax.typing.ArrayLike]
    """(steps before this one, updated state) -> learning rate"""
    logical_state: bool = False
    """whether the arrays of its state are logical ones, not padded as the parameters are"""


def choose_optimizer(config: OptimizerConfig, steps: int, own: Optimizer, logical: Logical | None = None) -> Chosen:
    """Returns the user's optimizer, or the one that a configuration names; `logical` is that of `make_optimizer`."""
    check_optimizer(own)
    if own is not None:
        return Chosen(own, lambda step, opt_state: injected_learning_rate(opt_state))
    schedule, named = make_schedule(config, steps), make_optimizer(config, steps, logical)
    return Chosen(named, lambda step, opt_state: schedule(step), config.name in LOGICAL_STATE)


def injected_learning_rate(opt_state: Any) -> jax.typing.ArrayLike:
    """The ``learning_rate`` that optax.inject_hyperparams keeps; NaN (null in metrics) unless there is exactly one."""
    found = optax.tree_utils.tree_get_all_with_path(
        opt_state, "learning_rate", filtering=lambda path, value: isinstance(value, jax.Array)
    )
    return found[0][1] if len(found) == 1 else jnp.nan


def check_unused_flags(own: object, in_file: OptimizerConfig, with_flags: OptimizerConfig) -> None:
    """Raises ConfigError if a flag changes a setting that the configuration file's own optimizer ignores."""
    for field in dataclasses.fields(OptimizerConfig) if own is not None else ():
        value = getattr(with_flags, field.name)
        if field.name not in ALWAYS_USED and value != getattr(in_file, field.name):
            raise ConfigError(
                f"optimizer.{field.name}={value} has no effect: the configuration file defines its own optimizer; "
                f"leave out --optimizer.{field.name.replace('_', '-')} and change `optimizer` in the file"
            )
