"""config.json: both spellings of RoPE, and models that are not supported."""

import json

import pytest

from tests.builders.folders import SCALED
from tsp_jax.config import RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.hf import weights as hf
from tsp_jax.hf.config import config_json

ABSENT = "absent"
BAD_CONFIGS = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
    "no architecture": ({"architectures": None}, ["architectures=null"]),
    "bias": ({"attention_bias": True}, ["attention_bias=true"]),
    "quantized": ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "window": ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, ["sliding_window=4096"]),
    "window by default": (
        {"architectures": ["MistralForCausalLM"], "sliding_window": ABSENT},
        ["sliding_window is missing"],
    ),
    "window of some layers": ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
    "rope": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ['rope_type="yarn"', "llama3"]),
    "rope without factor": ({"rope_scaling": {"rope_type": "linear"}}, ["factor is missing"]),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope=", "one RoPE"]),
    "part of a head rotated": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    "activation": ({"hidden_act": "relu"}, ["hidden_act=relu", "silu"]),
    "missing size": ({"hidden_size": None}, ["hidden_size is missing"]),
    "text for a size": ({"hidden_size": "28"}, ['hidden_size="28"']),
    "half a layer": ({"num_hidden_layers": 1.5}, ["num_hidden_layers=1.5"]),
    "heads": ({"num_attention_heads": 7}, ["model.num_heads=7", "model.num_heads=8"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_unsupported_models_are_refused(case, folder):
    change, words = BAD_CONFIGS[case]
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != ABSENT}))
    with pytest.raises(ConfigError) as refused:
        hf.read_config(folder)
    assert "\n" not in str(refused.value)
    for word in (str(path), *words):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "kwargs", [{"kind": "yarn"}, {"factor": 0.0}, {"low_freq_factor": 4.0}, {"original_context": -1}]
)
def test_impossible_scaling_is_refused(kwargs):
    with pytest.raises(ConfigError, match=f"model.rope_scaling.*{next(iter(kwargs))}"):
        RopeScaling(**kwargs)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_rope_are_read(key, tmp_path):
    raw = config_json(SCALED, "float32")
    rope, theta = raw.pop("rope_scaling"), raw.pop("rope_theta")
    raw |= {key: rope, "rope_theta": theta} if key == "rope_scaling" else {key: {**rope, "rope_theta": theta}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert hf.read_config(tmp_path) == SCALED
