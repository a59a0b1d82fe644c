"""The optimizer of a run: AdamW from an OptimizerConfig, or an optax transformation of the user's own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tsp_jax.config import OptimizerConfig
from tsp_jax.errors import ConfigError

NOT_DECAYED = ("scale", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "sinks")
"""names of parameters without weight decay"""
Optimizer = optax.GradientTransformation | None
"""the user's own optimizer; None: AdamW from an OptimizerConfig"""
ALWAYS_USED = ("zero1",)
"""fields of OptimizerConfig that apply to the user's own optimizer too"""


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to the peak, then cosine decay to the final fraction at `steps`."""
    peak, warmup = config.learning_rate, warmup_steps(config, steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak * config.final_fraction)


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """Number of warm-up steps: as configured if the run has more steps than that, else a tenth of the run's steps."""
    return config.warmup_steps if config.warmup_steps < steps else steps // 10


def describe_shorter_warmup(config: OptimizerConfig, steps: int, own: Optimizer) -> str | None:
    """One line if AdamW's warm-up is shorter than configured; None if not, or if the user's own optimizer is used."""
    if own is not None or (used := warmup_steps(config, steps)) == config.warmup_steps:
        return None
    return f"optimizer.warmup_steps={config.warmup_steps} is not less than steps={steps}; the warm-up has {used}"


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after global-norm clipping. Gradients are global arrays, so their norm is the same under every layout."""

    def decayed(params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)

    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed,
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), keep_state_in(config.moments_dtype, adamw))


def keep_state_in(dtype: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Stores the floating-point state of `inner` in `dtype` between steps; updates are computed in float32.

    optax itself can store only the first moment in a narrower dtype.
    """

    def cast(state: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

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
            "use optimizer = optax.chain(...), or Config(optimizer=OptimizerConfig(...)) for AdamW"
        )


def choose_optimizer(
    config: OptimizerConfig, steps: int, own: Optimizer
) -> tuple[optax.GradientTransformation, Callable[[Any, Any], jax.typing.ArrayLike]]:
    """Returns the user's optimizer or AdamW, and a function (steps so far, updated state) -> learning rate."""
    check_optimizer(own)
    if own is not None:
        return own, lambda step, opt_state: injected_learning_rate(opt_state)
    schedule = make_schedule(config, steps)
    return make_optimizer(config, steps), lambda step, opt_state: schedule(step)


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
