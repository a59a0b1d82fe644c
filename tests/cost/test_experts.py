"""What has no estimate for experts says so by name."""

import dataclasses

import pytest

from tests.builders.steps import CONFIG
from tsp_jax.config import ExpertsConfig
from tsp_jax.cost.memory import step_memory
from tsp_jax.cost.passes import step_passes
from tsp_jax.cost.serving import serving_memory
from tsp_jax.errors import ConfigError
from tsp_jax.layout import get_layout

MODEL = dataclasses.replace(CONFIG.model, experts=ExpertsConfig(number=8, per_token=2))
MIXTURE = dataclasses.replace(CONFIG, model=MODEL)
ON = get_layout("tsp"), {"data": 1, "tsp": 8}


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda: step_memory(MIXTURE, *ON), "the estimate of memory"),
        (lambda: step_passes(MIXTURE, *ON), "the estimate of time"),
        (lambda: serving_memory(MIXTURE, *ON, chunk=8), "the estimate of serving"),
    ],
)
def test_what_has_no_experts_refuses_them(ask, what):
    with pytest.raises(ConfigError, match=f"model.experts.number=8 is not supported by {what}; use model.experts"):
        ask()
