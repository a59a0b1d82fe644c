"""What a step's line of metrics says about the routers of a model with experts."""

from typing import Any

import numpy as np

from tsp_jax.training.step import StepMetrics


def step_values(metrics: StepMetrics) -> dict[str, Any]:
    """The metrics of a step by name: numbers, and for the routers lists of numbers.

    Of the routers: router_balance and router_z, the mean balance loss and z-loss of the layers, without their factors;
    for each layer expert_entropy, the entropy of the shares of choices by expert (log E in balance), and
    expert_share_most and expert_share_least, the largest and the smallest share times E (1 in balance).
    """
    values = metrics._asdict()
    router = values.pop("router")
    line: dict[str, Any] = {name: float(value) for name, value in values.items()}
    if not router:
        return line
    balance_L, z_L, shares_LE = (np.asarray(array, np.float64) for array in router)
    logs_LE = np.log(np.where(shares_LE > 0, shares_LE, 1.0))
    num_experts = shares_LE.shape[1]
    return line | {
        "router_balance": float(balance_L.mean()), "router_z": float(z_L.mean()),
        "expert_entropy": (-(shares_LE * logs_LE).sum(axis=1)).tolist(),
        "expert_share_most": (num_experts * shares_LE.max(axis=1)).tolist(),
        "expert_share_least": (num_experts * shares_LE.min(axis=1)).tolist(),
    }  # fmt: skip
