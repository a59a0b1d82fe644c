"""The optimizers by name: optax transformations that give the same updates under every layout.

A layout may pad a weight with rows of zeros and change the order of its rows (`tsp_jax.stored`). Elementwise optimizers
and Muon's orthogonalization do not see that. What depends on the shape of a weight, or takes means over it, uses its
logical form.

Dims: L layers, m and n rows and columns of a weight.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import lax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from tsp_jax.config.optimizer import OptimizerConfig, OptimizerName
from tsp_jax.stored import NoPadding, abstract_logical

Settings = dict[str, Any]
"""as in `tsp_jax.config.optimizer.SETTINGS`"""
NOT_DECAYED = (
    "scale", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias", "sinks",
    "router_bias", "gate_bias", "up_bias", "down_bias",
)  # fmt: skip
"""names of parameters without weight decay"""
MUON_RMS = 0.2
"""root mean square of Muon's updates, about that of AdamW's, so that one learning rate serves both: Liu et al., Muon is
Scalable for LLM Training, arXiv 2502.16982"""
ADAFACTOR_RMS = 1.0
"""largest root mean square of Adafactor's update of a parameter: Shazeer and Stern, arXiv 1804.04235"""


class Logical:
    """The logical form of parameters; see `tsp_jax.stored`. Without arguments: the stored form is the logical one.

    Args:
      paddings: of the parameters, in a tree like theirs.
      stored: shapes, dtypes and shardings of the parameters as they are stored.
    """

    def __init__(self, paddings: Any = (), stored: Any = ()):
        arrays = jax.tree_util.tree_leaves_with_path(abstract_logical(paddings, stored))
        found = zip(jax.tree.leaves(paddings), arrays, strict=True)
        self._by_path = {_key(path): (padding, array) for padding, (path, array) in found}

    def shape(self, path: Any, array: jax.Array) -> tuple[int, ...]:
        """Logical shape of the parameter at a path, whose stored array is given."""
        return self._by_path[_key(path)][1].shape if _key(path) in self._by_path else array.shape

    def unpad(self, tree: Any) -> Any:
        """Stored arrays -> logical ones. A part of the parameters' tree may be missing."""

        def one(path, array):
            if _key(path) not in self._by_path:
                return array
            padding, logical = self._by_path[_key(path)]
            return lax.with_sharding_constraint(padding.unpad(array), logical.sharding) if padding.padded else array

        return jax.tree_util.tree_map_with_path(one, tree)

    def pad(self, tree: Any) -> Any:
        """Inverse of `unpad`."""
        return jax.tree_util.tree_map_with_path(
            lambda path, array: self._by_path.get(_key(path), (NoPadding(),))[0].pad(array), tree
        )

    def run(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """A transformation of stored arrays that runs `inner` on logical ones; its state is of logical arrays."""

        def update(updates, state, params=None):
            updates, state = inner.update(self.unpad(updates), state, self.unpad(params))
            return self.pad(updates), state

        return optax.GradientTransformation(lambda params: inner.init(self.unpad(params)), update)


def _key(path: Any) -> str:
    return jax.tree_util.keystr(path)


def decayed(params: Any) -> Any:
    """Whether each parameter decays."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


# ------------------------------------------------------------------------------------------------ the table


def _adamw(schedule: optax.Schedule, settings: Settings, _: Logical) -> optax.GradientTransformation:
    return optax.adamw(schedule, mask=decayed, **settings)


def _lion(schedule: optax.Schedule, settings: Settings, _: Logical) -> optax.GradientTransformation:
    return optax.lion(schedule, mask=decayed, **settings)


def _sgd(schedule: optax.Schedule, settings: Settings, _: Logical) -> optax.GradientTransformation:
    return _scaled(optax.trace(settings["momentum"]), schedule, settings)


def _adafactor(schedule: optax.Schedule, settings: Settings, logical: Logical) -> optax.GradientTransformation:
    """optax.adafactor whose learning rate is not relative to the parameters, and scales weight decay too."""
    direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(ADAFACTOR_RMS))
    return logical.run(_scaled(direction, schedule, settings))


def _muon(schedule: optax.Schedule, settings: Settings, logical: Logical) -> optax.GradientTransformation:
    """Muon for the matrix of each layer, AdamW for tables, norms and other vectors.

    An array [L, m, n] is L matrices. Their orthogonalized updates are multiplied by `MUON_RMS` sqrt(max(m, n)).
    """
    adam = {name: value for name, value in settings.items() if name != "momentum"}

    def matrices(params):
        numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map(lambda param: numbers if param.ndim == 3 else None, params)

    def labels(params):
        return jax.tree.map(lambda param: "muon" if param.ndim == 3 else "adam", params)

    def scale(updates, params=None):
        def one(path, update):
            return MUON_RMS * math.sqrt(max(logical.shape(path, update)[1:])) * update

        return jax.tree_util.tree_map_with_path(one, updates)

    muon = scale_by_muon(beta=settings["momentum"], weight_dimension_numbers=matrices)
    direction = optax.chain(muon, optax.stateless(scale))
    return optax.partition(
        {"muon": _scaled(direction, schedule, settings), "adam": _adamw(schedule, adam, logical)}, labels
    )


def _scaled(
    direction: optax.GradientTransformation, schedule: optax.Schedule, settings: Settings
) -> optax.GradientTransformation:
    """With decoupled weight decay, times the learning rate."""
    decay = optax.add_decayed_weights(settings["weight_decay"], decayed)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(schedule))


_TABLE: dict[OptimizerName, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _sgd,
}
LOGICAL_STATE = ("adafactor",)
"""optimizers whose state is of logical arrays"""


def by_name(config: OptimizerConfig, schedule: optax.Schedule, logical: Logical) -> optax.GradientTransformation:
    """The optimizer that a configuration names, without clipping."""
    return _TABLE[config.name](schedule, config.settings, logical)
