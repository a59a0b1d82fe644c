"""config.json of every family: read, written as it is read, and refused by the key that matters."""

import dataclasses
import json
import math

import pytest

from tsp_jax.config import ExpertsConfig, ModelConfig, RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.hf.config import config_json, read_config
from tsp_jax.hf.families import FAMILIES

SIZES = {
    "vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 120, "head_dim": 12, "max_position_embeddings": 640, "rms_norm_eps": 1e-5,
}  # fmt: skip
MODEL = ModelConfig(
    vocab_size=72, d_model=32, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=12, d_ff=120,
    rope_scaling=RopeScaling(original_context=640),
)  # fmt: skip
GEMMA = {
    "norms": "both", "norm_unit_offset": True, "embedding_scale": math.sqrt(32), "activation": "gelu",
    "tie_embeddings": True, "attention_scale": 1 / 16,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625, "logits_scaling": 8.0,
}  # fmt: skip
GRANITE = {"embedding_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.015625, "logits_scale": 0.125}
BIASED = ExpertsConfig(number=128, per_token=4, router_bias=True, biases=True)
GPT_OSS = {
    "qkv_bias": True, "out_bias": True, "attention_sinks": True, "activation": "clamped_swiglu",
    "rope_theta": 150_000.0, "window": 128, "layer_kinds": ("sliding", "full"),
}  # fmt: skip
GPT_OSS_ROPE = RopeScaling(kind="yarn", factor=32.0, original_context=4096, truncate=False)
EIGHT = ExpertsConfig(number=8, per_token=2)
FULL, SLIDING = "full_attention", "sliding_attention"
FACTORS = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LONGROPE = RopeScaling(
    kind="longrope", factor=10.0, original_context=64, short_factors=(1.0,) * 6, long_factors=tuple(FACTORS)
)
READ = {
    "llama": ({}, {}),
    "mistral": ({}, {"window": 4096}),
    "qwen2": ({}, {"qkv_bias": True}),
    "qwen2 windows": (
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 4},
        {"qkv_bias": True, "window": 9, "layer_kinds": ("full",) * 4 + ("sliding",) * 2},
    ),
    "qwen3": ({"attention_bias": False}, {"qk_norm": True}),
    "qwen3 windows": (
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": [FULL, SLIDING, SLIDING] * 2},
        {"qk_norm": True, "window": 9, "layer_kinds": ("full", "sliding", "sliding")},
    ),
    "gemma2": (
        {"hidden_act": "silu", "sliding_window": 9, "query_pre_attn_scalar": 144},
        {
            **GEMMA, "window": 9, "layer_kinds": ("sliding", "full"), "attention_scale": 1 / 12,
            "attention_softcap": 50.0, "logits_softcap": 30.0,
        },
    ),
    "gemma2 without caps": (
        {
            "attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 12,
            "layer_types": [FULL] * 6, "use_bidirectional_attention": None,
        },
        {**GEMMA, "attention_scale": None},
    ),
    "gemma3_text": (
        {"sliding_window": 9},
        {
            **GEMMA, "qk_norm": True, "window": 9, "layer_kinds": ("sliding",) * 5 + ("full",), "rope_theta": 1e6,
            "local_rope_theta": 1e4,
        },
    ),
    "gemma3_text of a longer pattern": (
        {
            "sliding_window": 9, "sliding_window_pattern": 4, "final_logit_softcapping": 20.0, "rope_theta": 5e5,
            "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            **GEMMA, "qk_norm": True, "window": 9, "layer_kinds": ("sliding",) * 3 + ("full",), "rope_theta": 5e5,
            "local_rope_theta": 2e4, "logits_softcap": 20.0,
            "rope_scaling": RopeScaling(kind="linear", factor=8.0, original_context=640),
        },
    ),
    "gemma3_text without windows": (
        {"layer_types": [FULL] * 6},
        {**GEMMA, "qk_norm": True, "rope_theta": 1e6},
    ),
    "phi3": (
        {"sliding_window": 9, "partial_rotary_factor": 0.5},
        {"window": 9, "rope_scaling": RopeScaling(original_context=640, fraction=0.5)},
    ),
    "phi3 longrope": (
        {
            "hidden_size": 96,
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 6, "long_factor": FACTORS},
            "original_max_position_embeddings": 64,
        },
        {"rope_scaling": LONGROPE, "d_model": 96},
    ),
    "smollm3": (
        {"tie_word_embeddings": False},
        {"layer_kinds": ("full", "full", "full", "full_nope"), "rope_theta": 2e6},
    ),
    "smollm3 by a list": (
        {"no_rope_layers": [1, 0, 1, 0, 1, 0, 0], "layer_types": [SLIDING, FULL] * 3, "sliding_window": 9},
        {"layer_kinds": ("sliding", "full_nope"), "window": 9, "rope_theta": 2e6, "tie_embeddings": True},
    ),
    "smollm3 with RoPE everywhere": (
        {"no_rope_layers": [1] * 6},
        {"rope_theta": 2e6, "tie_embeddings": True},
    ),
    "granite": (MULTIPLIERS, GRANITE),
    "granite by default": ({}, {"attention_scale": 1.0}),
    "olmo2": ({}, {"norms": "post", "qk_norm": True, "qk_norm_width": "all"}),
    "mixtral": ({}, {"experts": EIGHT, "rope_theta": 1e6}),
    "mixtral with a window": (
        {"sliding_window": 9, "num_experts": 6, "num_experts_per_tok": 6, "router_jitter_noise": 0.1},
        {"experts": ExpertsConfig(number=6, per_token=6), "rope_theta": 1e6, "window": 9},
    ),
    "qwen3_moe": (
        {"moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        {"experts": ExpertsConfig(number=128, per_token=8), "qk_norm": True, "d_ff": 24},
    ),
    "qwen3_moe by the other key": (
        {"num_local_experts": 16, "num_experts_per_tok": 1},
        {"experts": ExpertsConfig(number=16, per_token=1, normalize=False), "qk_norm": True, "d_ff": 768},
    ),
    "olmoe": (
        {"num_experts": 8, "head_dim": None},
        {
            "experts": ExpertsConfig(number=8, per_token=8, normalize=False), "qk_norm": True, "qk_norm_width": "all",
            "head_dim": 4,
        },
    ),
    "granitemoe": ({**MULTIPLIERS, "router_aux_loss_coef": 0.01}, {**GRANITE, "experts": EIGHT}),
    "gpt_oss": (
        {"attention_bias": True, "swiglu_limit": 7, "hidden_act": "silu", "initial_context_length": 4096},
        {**GPT_OSS, "experts": BIASED, "rope_scaling": dataclasses.replace(GPT_OSS_ROPE, original_context=4096)},
    ),
    "gpt_oss in MXFP4": (
        {
            "num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": [FULL] * 6,
            "rope_scaling": {"rope_type": "default"},
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        },
        {
            **GPT_OSS, "window": None, "layer_kinds": (),
            "experts": dataclasses.replace(BIASED, number=8, per_token=2),
        },
    ),
}  # fmt: skip
"""model_type and a name -> (more keys than SIZES, fields other than MODEL's)"""
REFUSED = {
    "gemma3": ({"architectures": ["Gemma3ForConditionalGeneration"]}, "architectures=.*Gemma3ForCausalLM"),
    "gemma3 by its type": ({"text_config": {}}, 'model_type="gemma3" is not supported; .*gemma3_text'),
    "gemma2 both ways": ({"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
    "gemma2 biased": ({"attention_bias": True}, "attention_bias=true .* without biases"),
    "gemma2 without a window": ({"sliding_window": None}, "sliding_window=null is no window"),
    "gemma2 activation": (
        {"hidden_activation": "gelu"},
        "hidden_activation=gelu is not supported; .*gelu_pytorch_tanh",
    ),
    "gemma3_text capped": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 .* does not apply it"),
    "gemma3_text scaled locally": (
        {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
        "rope_type=linear of sliding_attention",
    ),
    "phi3 linear": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type=linear is not supported in a phi3 model; use default, longrope",
    ),
    "phi3 factors": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": FACTORS}},
        "short_factors has 1 values, heads of 12 have 6",
    ),
    "llama partly rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 .* rotates whole heads"),
    "smollm3 windows without RoPE": (
        {"use_sliding_window": True, "sliding_window": 9},
        "use_sliding_window=true is not supported",
    ),
    "smollm3 one window without RoPE": (
        {"no_rope_layers": [1, 0] * 3, "layer_types": [FULL, SLIDING] * 3, "sliding_window": 9},
        r"layer_types\[1\]=sliding_attention of a layer without RoPE",
    ),
    "smollm3 short list": ({"no_rope_layers": [1, 0]}, "no_rope_layers=.*; use 6 values"),
    "smollm3 interval": ({"no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
    "granite zero": ({"logits_scaling": 0}, "logits_scaling=0"),
    "granite biased MLP": ({"mlp_bias": True}, "mlp_bias=true"),
    "olmo2 biased": ({"attention_bias": True}, "attention_bias=true"),
    "qwen2 types": ({"layer_types": ["chunked_attention"] * 6}, "layer_types=.* each full_attention or sliding"),
    "mixtral of too few experts": (
        {"num_experts_per_tok": 9},
        "model.experts.per_token=9 is more than model.experts.number=8",
    ),
    "mixtral without experts": ({"num_local_experts": 0}, "num_local_experts=0"),
    "mixtral of two numbers": (
        {"num_local_experts": 4, "num_experts": 6},
        "num_experts=6 is not the number of experts; use num_local_experts=4 alone",
    ),
    "mixtral of too many experts": ({"num_local_experts": 10**15}, "model.experts.number=1000000000000000"),
    "mixtral quantized": (
        {"quantization_config": {"quant_method": "unheard-of"}},
        'method="unheard-of" .* not quantized$',
    ),
    "gpt_oss in another format": (
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        'quantization_config.quant_method="awq" is not supported; use a model that is not quantized, or one in mxfp4$',
    ),
    "gpt_oss in no format": ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method=null"),
    "gpt_oss limit": ({"swiglu_limit": 6.5}, "swiglu_limit=6.5 is not supported; use a model with 7.0"),
    "gpt_oss gain": ({"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported; use a model with 1.702"),
    "gpt_oss without biases": ({"attention_bias": False}, "attention_bias=false .* with biases"),
    "qwen3_moe partly dense": ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] .* whose layers all have experts"),
    "qwen3_moe every second layer": ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 .* layers all have experts"),
    "qwen3_moe windows": ({"use_sliding_window": True, "sliding_window": 9}, "sliding_window=9 is not supported"),
    "olmoe clipped": ({"clip_qkv": 8.0}, "clip_qkv=8.0 .* are not clipped"),
    "granitemoe without a number": ({"num_local_experts": None}, "num_local_experts=null is not the number"),
    "qwen2 of many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is too large; use at most"),
}


def write(folder, case: str, keys: dict):
    """A folder with config.json of the family that a case's name begins with."""
    (folder / "config.json").write_text(json.dumps({"model_type": case.partition(" ")[0], **SIZES, **keys}))
    return folder


@pytest.mark.parametrize("case", READ)
def test_a_family_is_read(case, tmp_path):
    keys, fields = READ[case]
    assert read_config(write(tmp_path, case, keys)) == dataclasses.replace(MODEL, **fields)


@pytest.mark.parametrize("case", READ)
def test_a_family_is_written_as_it_is_read(case, tmp_path):
    """As itself if the source folder is of it, else as a family that computes the same."""
    model = read_config(write(tmp_path, case, READ[case][0]))
    source = json.loads((tmp_path / "config.json").read_text())
    for carried in (source, None):
        written = config_json(model, "float32", carried)
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert read_config(tmp_path) == model
    assert config_json(model, "float32", source)["model_type"] == source["model_type"]


@pytest.mark.parametrize("case", REFUSED)
def test_a_variant_that_is_not_supported_is_refused(case, tmp_path):
    keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words) as refused:
        read_config(write(tmp_path, case, keys))
    assert str(tmp_path / "config.json") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({}, "llama"),
        ({"d_model": 30}, "mistral"),
        ({"window": 9}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True, "layer_kinds": ("full", "sliding"), "window": 9}, "qwen3"),
        ({"window": 9, "layer_kinds": ("sliding", "full")}, "smollm3"),
        ({"rope_scaling": LONGROPE, "d_model": 96}, "phi3"),
        ({"rope_scaling": LONGROPE}, "llama"),
        ({"rope_scaling": RopeScaling(fraction=0.5)}, "phi3"),
        ({"residual_scale": 0.5}, "granite"),
        ({"norms": "post", "qk_norm": True, "qk_norm_width": "all"}, "olmo2"),
        ({"experts": EIGHT}, "mixtral"),
        ({"experts": EIGHT, "qk_norm": True}, "qwen3_moe"),
        ({"experts": EIGHT, "qk_norm": True, "qk_norm_width": "all", "head_dim": 4}, "olmoe"),
        ({"experts": EIGHT, "residual_scale": 0.5}, "granitemoe"),
        ({**GPT_OSS, "experts": BIASED}, "gpt_oss"),
    ],
)
def test_the_family_follows_from_the_model(fields, model_type):
    written = config_json(dataclasses.replace(MODEL, **fields), "float32")
    assert (written["model_type"], written["architectures"]) == (model_type, [FAMILIES[model_type].architecture])


def test_sizes_of_gpt_oss_are_those_published(tmp_path):
    """Billions of parameters of gpt-oss-120b, by default, and of 20b: arXiv 2508.10925, table 1."""
    for layers, experts, total, active in ((36, 128, 116.83, 5.13), (24, 32, 20.91, 3.61)):
        keys = {"model_type": "gpt_oss", "num_hidden_layers": layers, "num_local_experts": experts}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        model = read_config(tmp_path)
        embedding = model.vocab_size * model.d_model  # no active parameters there
        found = model.num_params / 1e9, (model.active_params - embedding) / 1e9
        assert found == (pytest.approx(total, abs=0.005), pytest.approx(active, abs=0.005))


def test_the_source_is_left_if_the_model_is_no_longer_of_its_family():
    model = dataclasses.replace(MODEL, window=9)
    assert config_json(model, "float32", {"model_type": "llama"})["model_type"] == "mistral"
