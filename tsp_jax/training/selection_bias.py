"""Balance of experts without a loss: a bias of each expert, which only decides who is chosen, follows its load.

Dims: L layers, E experts.
"""

from typing import Any

import jax.numpy as jnp

from tsp_jax.ops.router import RouterSums


def with_selection_bias(params: Any, before: Any, router: RouterSums | tuple[()], rate: float) -> Any:
    """Parameters after a step, with every layer's selection bias moved toward balance.

        bias_e = bias_e before + rate sign(1 / E - share_e)

    The bias gets no gradient, and nothing of what the optimizer does to it counts.

    Args:
      params: parameters after the optimizer's update.
      before: parameters before it.
      router: sums of the step's routers, each [L, ...]; () without experts.
      rate: `ExpertsConfig.bias_rate`; 0: there is no bias.

    Source: Wang et al., arXiv 2408.15664 (DeepSeek-V3 uses 0.001).
    """
    if not rate or not router:
        return params

    def update(tree: Any, old: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = {name: update(value, old[name]) for name, value in tree.items()}
        if "selection_bias" in tree:
            shares_LE = router.shares_E
            tree["selection_bias"] = old["selection_bias"] + rate * jnp.sign(1 / shares_LE.shape[-1] - shares_LE)
        return tree

    return update(params, before)
