"""Sizes and numbers of a configuration that no machine holds, or no program, are refused."""

from typing import get_args

import pytest

from tsp_jax.config import MOST_BYTES, Config, ExpertsConfig, LoraConfig, ModelConfig, OptimizerConfig
from tsp_jax.config.experts import SLABS
from tsp_jax.config.stream import ExpertKernel
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.devices import HARDWARE, MOST_DEVICES

SIZES = {
    "vocab_size": 288,
    "d_model": 64,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 8,
    "d_ff": 192,
}


def test_no_target_holds_the_most_bytes():
    largest = max(hardware.memory_bytes * MOST_DEVICES for hardware in HARDWARE.values() if hardware.name != "cpu")
    assert 0.5 < largest / MOST_BYTES < 1


IMPOSSIBLE = {
    "vocabulary": ({"vocab_size": 2 * 10**9, "d_model": 10**6}, "model.vocab_size=2000000000 makes weights .* bytes"),
    "width": ({"d_model": 2 * 10**9, "d_ff": 2 * 10**9}, "model.d_model=2000000000 makes weights .* bytes"),
    "heads": ({"num_heads": 2 * 10**9, "num_kv_heads": 2 * 10**9, "d_model": 10**6}, "model.num_heads=2000000000"),
    "layers": ({"num_layers": 2 * 10**9, "d_model": 4096}, "model.num_layers=2000000000"),
    "beyond 32 bits": ({"num_layers": 2**31}, "model.num_layers=2147483648 is too large"),
    "text": ({"num_layers": "2"}, "model.num_layers='2' is a str; use a int"),
    "half a layer": ({"num_layers": 1.5}, "model.num_layers=1.5 is a float; use a int"),
    "text for a truth": ({"qk_norm": "false"}, "model.qk_norm='false' is a str; use a bool"),
    "unknown kinds of layers": (
        {"layer_kinds": ("wide",)},
        r"model.layer_kinds=\('wide',\) is unknown",
    ),
    "kinds of layers as a list": ({"layer_kinds": ["full"]}, r"model.layer_kinds=\['full'\] is unknown"),
    "no window for a layer": (
        {"layer_kinds": ("full", "sliding")},
        "model.layer_kinds=sliding needs a window",
    ),
    "a window in no layer": ({"layer_kinds": ("full",), "window": 8}, "model.window=8 has no effect"),
    "rope of sliding layers in no layer": ({"local_rope_theta": 1e4}, "model.local_rope_theta=10000.0 has no effect"),
    "the width of no norm": ({"qk_norm_width": "all"}, "model.qk_norm_width=all has no effect"),
    "logits times 0": ({"logits_scale": 0.0}, "model.logits_scale=0.0 must be positive"),
    "eps that is 0 in float32": ({"norm_eps": 1e-50}, "model.norm_eps=1e-50 must be positive in float32"),
    "theta beyond float32": ({"rope_theta": 1e39}, r"model.rope_theta=1e\+39 is not finite in float32"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_models_are_refused(case):
    changes, words = IMPOSSIBLE[case]
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**(SIZES | changes))


@pytest.mark.parametrize(
    ("kinds", "num_layers", "period"),
    [
        ((), 2, ("sliding",)),
        (("full", "sliding"), 4, ("full", "sliding")),
        (("sliding", "full", "sliding", "full"), 8, ("sliding", "full")),
        (("sliding", "sliding"), 2, ("sliding",)),
        (("sliding", "full", "full", "full"), 3, ("sliding", "full", "full")),
    ],
)
def test_kinds_of_layers_repeat_after_the_shortest_period(kinds, num_layers, period):
    assert ModelConfig(**(SIZES | {"num_layers": num_layers, "layer_kinds": kinds, "window": 8})).period == period


def test_impossible_batches_and_rates_are_refused():
    with pytest.raises(ConfigError, match=r"batch=2000000000 makes layer inputs .* bytes"):
        Config(model=ModelConfig(**SIZES), steps=1, batch=2 * 10**9, seq_len=10**6)
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate=1e\+39 is not finite in float32"):
        OptimizerConfig(learning_rate=1e39)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": -1}, "lora.rank=-1 must not be negative"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha=0.0 must be positive"),
        ({"alpha": 32.0}, "lora.alpha=32.0 has no effect with lora.rank=0; use --lora.rank 16"),
        ({"base_dtype": "bfloat16"}, "lora.base_dtype=bfloat16 has no effect with lora.rank=0"),
        ({"rank": 4, "targets": ()}, "lora.targets is empty"),
        ({"rank": 4, "targets": ("q", "q")}, "lora.targets=q,q names a weight twice"),
        ({"rank": 4, "targets": ("q", "head")}, "lora.targets=q,head has 'head', which no layer has; use q,k,v,o,gate"),
        ({"rank": 4, "base_dtype": "float16"}, "lora.base_dtype=float16 is unknown; use one of float32, bfloat16"),
    ],
)
def test_adapters_that_mean_nothing_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"number": 8, "per_token": 9},
            "model.experts.per_token=9 is more than model.experts.number=8; use .*=8 at most",
        ),
        ({"number": 8, "per_token": 0}, "model.experts.per_token=0 must be positive"),
        ({"number": -1}, "model.experts.number=-1 must not be negative"),
        ({"number": 0, "per_token": 3}, "model.experts.per_token=3 has no effect with model.experts.number=0"),
        ({"balance_loss": 0.01}, "model.experts.balance_loss=0.01 has no effect with model.experts.number=0"),
        ({"number": 8, "scores": "relu"}, "model.experts.scores=relu is unknown; use one of softmax, sigmoid"),
        ({"number": 8, "scale": 0.0}, "model.experts.scale=0.0 must be positive"),
    ],
)
def test_experts_that_mean_nothing_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        ExpertsConfig(**fields)


MIXTURE = ModelConfig(**SIZES, experts=ExpertsConfig(number=8, per_token=2, shared=1))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"lora": LoraConfig(rank=4)}, "lora.rank=4"),
        ({"optimizer": OptimizerConfig(name="muon")}, "optimizer.name=muon"),
    ],
)
def test_what_does_not_know_experts_refuses_them(fields, what):
    with pytest.raises(ConfigError, match=f"model.experts.number=8 is not supported by {what}; use model.experts"):
        Config(model=MIXTURE, steps=1, batch=1, seq_len=8, **fields)


def test_a_router_that_the_loss_cannot_reach_is_refused():
    """The weight of a single choice, divided by itself, is 1. One expert needs no router."""

    def config(**experts):
        model = ModelConfig(**SIZES, experts=ExpertsConfig(**experts))
        return Config(model=model, steps=1, batch=1, seq_len=8)

    with pytest.raises(ConfigError, match=r"per_token=1 with model.experts.normalize=True .* use model.experts.normal"):
        config(number=8, per_token=1)
    assert config(number=8, per_token=1, normalize=False) and config(number=1, per_token=1) and config(number=8)


def test_kernels_of_experts_are_those_that_have_slabs():
    assert get_args(ExpertKernel) == ("auto", *SLABS)


def test_number_of_parameters_of_experts():
    expert, router = 3 * 64 * 192, 64 * 8
    dense = ModelConfig(**SIZES)
    assert MIXTURE.num_params == dense.num_params + 2 * (8 * expert + router)
    assert MIXTURE.active_params == dense.num_params + 2 * (2 * expert + router)
    assert dense.active_params == dense.num_params


def test_the_order_of_targets_does_not_matter():
    assert LoraConfig(rank=4, targets=("down", "q")) == LoraConfig(rank=4, targets=("q", "down"))
