"""AdamW with warm-up, cosine decay and global-norm clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tsp_jax.config import OptimizerConfig
from tsp_jax.errors import ConfigError

NOT_DECAYED = ("scale", "q_norm", "k_norm")
"""parameters that weight decay leaves alone"""


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak, then half a cosine down to the final fraction at `steps`."""
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps={config.warmup_steps} leaves nothing of steps={steps}; "
            f"use --optimizer.warmup-steps {steps // 10}"
        )
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, steps, peak * config.final_fraction)


def decay_mask(params: dict) -> dict:
    """Which parameters weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a run. On global arrays the norm that clips is global too."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask,
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), keep_state_in(config.moments_dtype, adamw))


def keep_state_in(dtype: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, whose state of floats waits from step to step in `dtype` and is computed in float32.

    optax itself can narrow the first moment alone.
    """

    def cast(state: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
