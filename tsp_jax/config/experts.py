"""A mixture of experts in place of the MLP of each layer."""

import dataclasses
from typing import Literal

from tsp_jax.config.checks import check
from tsp_jax.errors import ConfigError

RouterScores = Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP of each layer: gated MLPs; each token is the input of a few."""

    number: int = 0
    """E, experts of each layer, each a gated MLP of width d_ff; 0: none, each layer has one MLP"""
    per_token: int = 1
    """k, experts that a token is the input of: those with the highest scores"""
    scores: RouterScores = "softmax"
    """what scores are of the router's logits: softmax over all experts, or sigmoid of each (DeepSeek-V3)"""
    normalize: bool = True
    """a token's weights, which are the scores of its experts, are divided by their sum"""
    scale: float = 1.0
    """factor of the weights"""
    router_bias: bool = False
    """the router's logits have biases (gpt-oss)"""
    biases: bool = False
    """the three projections of each expert have biases (gpt-oss)"""
    shared: int = 0
    """experts that every token is the input of, with weight 1; together they are one MLP of width shared x d_ff"""
    balance_loss: float = 0.0
    """coefficient of the balance loss of each layer, E times the sum over experts of the share of choices times the
    mean probability, over all tokens of a micro-batch: 1 in balance"""
    z_loss: float = 0.0
    """coefficient of each layer's mean squared log-partition of the router's logits"""

    def __post_init__(self):
        owner = "model.experts."
        check(owner, self, positive="per_token scale", not_negative="number shared balance_loss z_loss")
        for field in dataclasses.fields(self):
            if not self.number and (value := getattr(self, field.name)) != field.default:
                raise ConfigError(
                    f"{owner}{field.name}={value} has no effect with {owner}number=0; use {owner}number=8"
                )
        if self.number and self.per_token > self.number:
            raise ConfigError(
                f"{owner}per_token={self.per_token} is more than {owner}number={self.number}; "
                f"use {owner}per_token={self.number} at most"
            )
