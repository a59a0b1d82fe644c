"""Bytes that a device receives in a training step, from shapes alone.

They are counted as `tsp_jax.inspect.collectives` counts them, by the formulas of `tsp_jax.cost.traffic`.
"""

from collections.abc import Mapping

from tsp_jax.config import Config
from tsp_jax.cost.step import OPS, Step
from tsp_jax.cost.traffic import Traffic
from tsp_jax.layout import Layout


def movements(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, str]:
    """Op (attention, mlp, experts, embed, loss) -> its movement, with `auto` resolved."""
    return {op: movement for op, (movement, _) in Step(config, layout, sizes).ops().items()}


def step_traffic(
    config: Config, layout: Layout, sizes: Mapping[str, int], *, forward: bool = False
) -> dict[str, Traffic]:
    """Bytes that a device receives in one micro-batch of a training step, in all layers together, by op and kind.

    With `accumulate` = 1 a micro-batch is the whole step. `forward` counts only the forward pass and the loss: weights
    or activations move once, keys and values are exchanged once, and partial outputs are summed once. With LoRA, an op
    whose weights have no adapters sends no gradients of them; sums of adapters' gradients, [r, D], are left out. If
    attention without adapters moves tokens, it moves a seventh less than counted.
    """
    received, lora = {}, config.lora
    adapted = {"attention" if name in "qkvo" else "mlp" for name in lora.targets} if lora.rank else {*OPS}
    for op, (movement, traffic) in Step(config, layout, sizes).ops().items():
        times = config.model.num_layers if op in ("mlp", "experts") else 1
        no_backward = forward or (op == "embed" and op not in adapted)
        received[op] = {kind: times * n for kind, n in traffic(movement, forward=no_backward).items()}
        if op not in adapted:
            received[op] |= dict.fromkeys(("weight_grads", "replica_sums"), 0)
    return received
