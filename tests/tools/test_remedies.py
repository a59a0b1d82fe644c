"""Flags that a report names for a bottleneck of a step of this project."""

import dataclasses
import re

import pytest

from tests.builders.steps import CONFIG, CPU
from tsp_jax.config import Config, ExpertsConfig
from tsp_jax.hardware.rates import exactly
from tsp_jax.inspect import Collective
from tsp_jax.inspect.bottleneck import Bottleneck
from tsp_jax.plan.compile import place_on
from tsp_jax.tools import cli
from tsp_jax.tools.remedies import remedies


def bottleneck(kind: str, part: str = "", what: str = "", mostly: str = "") -> Bottleneck:
    return Bottleneck(
        kind=kind, part=part, what=what, mostly=mostly, remedy="general words", gain_s=exactly(1.0), step_s=1.0
    )


def remedy(found: Bottleneck, bucket_bytes: int = 2**30, **changes) -> str:
    config = dataclasses.replace(CONFIG, **changes)
    gathered = Collective(
        op="all-gather", axis="tsp", group_size=8, scope="jit(f)/tsp/mlp/gather", count=1, bytes=bucket_bytes,
        elements=1, dtype="f32", is_async=True, name="g", computation="main",
    )  # fmt: skip
    return remedies(config, place_on(config, CPU), [gathered])(found)


MIXTURE = dataclasses.replace(CONFIG.model, experts=ExpertsConfig(number=8, per_token=2))
NAMED = {
    "movement": (
        bottleneck("communication", mostly="backward tsp/mlp/gather (all-gather g)"),
        {},
        "--stream.mlp-movement",
    ),
    "movement of experts": (
        bottleneck("communication", mostly="backward tsp/experts/gather (all-gather g)"),
        {"model": MIXTURE},
        "--stream.mlp-movement",
    ),
    "remat of experts": (bottleneck("recomputation"), {"model": MIXTURE, "remat": "full"}, "--remat save_attention (+"),
    "layout": (bottleneck("communication", mostly="forward tsp/mlp"), {"layout": "tp", "mesh": ""}, "--layout"),
    "buckets": (bottleneck("fixed cost", "tsp/mlp"), {}, "--stream.bucket-mib 0.018"),
    "kernel": (bottleneck("attention", what="attention at the rate of cudnn, the"), {}, "--stream.kernel cudnn"),
    "absent kernel": (bottleneck("attention", what="attention at the rate of aiter, the"), {}, "no flag: AMD's AITER"),
    "remat": (bottleneck("recomputation"), {"remat": "full"}, "--remat save_attention (+"),
    "host": (bottleneck("host"), {"remat": "offload"}, "--remat full ("),
    "optimizer": (bottleneck("memory", "optimizer"), {}, "--optimizer.moments-dtype bfloat16"),
}


@pytest.mark.parametrize("case", NAMED)
def test_flags_fit_the_step(case):
    found, changes, words = NAMED[case]
    assert words in remedy(found, **changes)


@pytest.mark.parametrize("case", NAMED)
def test_every_flag_exists(case):
    found, changes, _ = NAMED[case]
    for flag, value in re.findall(
        r"(--[a-z][\w.-]+) (bfloat16|gather|none|full|save_attention|cudnn|[\d.]+)", remedy(found, **changes)
    ):
        assert isinstance(cli.parse_flags(CONFIG, ["tiny", flag, value]), Config)


@pytest.mark.parametrize(
    ("found", "changes"),
    [
        (bottleneck("contention"), {}),
        (bottleneck("memory", "tsp/mlp"), {}),
        (bottleneck("recomputation"), {"remat": "none"}),
        (bottleneck("fixed cost", "tsp/mlp"), {"layout": "fsdp_cp", "mesh": ""}),
        (bottleneck("fixed cost", "other"), {}),
    ],
)
def test_where_no_flag_helps_general_words_do(found, changes):
    assert remedy(found, **changes) == "general words"


def test_buckets_that_cannot_grow_are_said_to_be_so():
    assert remedy(bottleneck("fixed cost", "tsp/mlp"), bucket_bytes=16).startswith("no flag: buckets are a quarter")
