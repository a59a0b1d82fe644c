"""config.json: what its keys mean, alone and together, and what is refused."""

import dataclasses
import json
import os

import msgspec
import numpy as np
import pytest

from tests.builders.arrays import place_case
from tests.builders.folders import LLAMA, SCALED
from tsp_jax.config import ExpertsConfig, RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.hf import config as hf_config
from tsp_jax.hf import weights as hf
from tsp_jax.hf.config import config_json, read_dtype
from tsp_jax.hf.families import FAMILIES
from tsp_jax.hf.params import param_tree, shapes
from tsp_jax.ops.rope import frequencies

ABSENT = "absent"
MODEL = dataclasses.replace(LLAMA, d_model=32)  # transformers demands that the heads of a Llama divide its width
MISTRAL, QWEN3 = ({"architectures": None, "model_type": family} for family in ("mistral", "qwen3"))
LINEAR = {"rope_type": "linear", "factor": 4.0}
LINEAR_4 = RopeScaling(kind="linear", factor=4.0)
FACTORS = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTEXT = "original_max_position_embeddings"

READ = {
    "rope_scaling before rope_parameters": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": LINEAR, "rope_theta": ABSENT},
        {"rope_scaling": LINEAR_4, "rope_theta": 10_000.0},
    ),
    "theta beside both": (
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": LINEAR, "rope_theta": 5e5},
        {"rope_scaling": LINEAR_4, "rope_theta": 5e5},
    ),
    "theta inside before theta beside": (
        {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 5e5},
        {"rope_theta": 1e6},
    ),
    "rope_type before type": ({"rope_scaling": {"type": "dynamic", **LINEAR}}, {"rope_scaling": LINEAR_4}),
    "type": ({"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_scaling": LINEAR_4}),
    "empty rope_scaling": ({"rope_scaling": {}, "rope_parameters": LINEAR}, {"rope_scaling": LINEAR_4}),
    "context of max_position_embeddings": (
        {"rope_scaling": FACTORS, "max_position_embeddings": 64},
        {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=64)},
    ),
    "context by default": (
        {"rope_scaling": FACTORS, "max_position_embeddings": ABSENT},
        {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=2048)},
    ),
    "context beside before context inside": (
        {"rope_scaling": {**FACTORS, CONTEXT: 64}, CONTEXT: 32},
        {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=32)},
    ),
    "eps by default": ({"rms_norm_eps": ABSENT}, {"norm_eps": 1e-6}),
    "sizes by default": (
        {"vocab_size": ABSENT, "intermediate_size": ABSENT, "hidden_size": ABSENT, "head_dim": ABSENT},
        {"vocab_size": 32_000, "d_ff": 11_008, "d_model": 4096, "head_dim": 512},
    ),
    "heads by default": ({"num_key_value_heads": ABSENT}, {"num_kv_heads": 8}),
    "heads by default of mistral": (
        {**MISTRAL, "num_key_value_heads": ABSENT, "num_attention_heads": 16},
        {"num_heads": 16, "num_kv_heads": 8},
    ),
    "heads null": ({**MISTRAL, "num_key_value_heads": None}, {"num_kv_heads": 8}),
    "width of heads of qwen3": ({**QWEN3, "head_dim": ABSENT}, {"head_dim": 128, "qk_norm": True}),
    "width of heads that do not divide": (
        {**MISTRAL, "head_dim": ABSENT, "hidden_size": 52},
        {"d_model": 52, "head_dim": 6},
    ),
    "window after max_window_layers": (
        {**QWEN3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"qk_norm": True, "window": 8, "layer_kinds": ("full", "sliding")},
    ),
    "no window before max_window_layers": (
        {**QWEN3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"qk_norm": True},
    ),
    "no window without use_sliding_window": ({**QWEN3, "sliding_window": ABSENT}, {"qk_norm": True}),
    "layer types": ({"layer_types": ["full_attention", "attention"]}, {}),
    "window": ({**MISTRAL, "sliding_window": 8}, {"window": 8}),
    "window by default": ({**MISTRAL, "sliding_window": ABSENT}, {"window": 4096}),
    "window of mistral with Llama's name": ({"model_type": "mistral", "sliding_window": 8}, {"window": 8}),
    "window of qwen3": (
        {**QWEN3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"qk_norm": True, "window": 8},
    ),
    "window by layer types": (
        {**QWEN3, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2, "use_sliding_window": True},
        {"qk_norm": True, "window": 8},
    ),
    "model_type before architectures": ({**QWEN3, "architectures": ["LlamaForCausalLM"]}, {"qk_norm": True}),
    "no model_type": ({"model_type": ABSENT}, {}),
    "no architectures": ({"architectures": None}, {}),
    "tanh by another name": ({"hidden_act": "gelu_new"}, {"activation": "gelu"}),
    "unknown keys": ({"final_logit_softcapping": 30.0, "attention_dropout": 0.1, "auto_map": {"a": "b"}}, {}),
}
"""changes of MODEL's config.json, changes of MODEL"""
REFUSED = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
    "no family": (
        {"architectures": None, "model_type": ABSENT},
        ["model_type=null", "use llama, mistral, qwen2, qwen3"],
    ),
    "other family": ({"model_type": "gemma"}, ['model_type="gemma"']),
    "family of a wrong type": ({"model_type": ["llama"]}, ['model_type=["llama"]']),
    "bias": ({"attention_bias": True}, ["attention_bias=true"]),
    "bias of the MLP": ({"mlp_bias": 1}, ["mlp_bias=1"]),
    "quantized": ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "not causal": ({"is_causal": False}, ["is_causal=false"]),
    "layers of several kinds": ({"per_layer_config": {"0": {"intermediate_size": 8}}}, ["per_layer_config"]),
    "window of 0": ({**MISTRAL, "sliding_window": 0}, ["sliding_window=0 is no window", "use 4096"]),
    "window without a size": (
        {**QWEN3, "sliding_window": None, "layer_types": ["sliding_attention"] * 2},
        ["sliding_window=null is no window"],
    ),
    "window of llama": ({"sliding_window": 8}, ["sliding_window=8"]),
    "window of some layers": ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
    "window of layers that is not used": (
        {**QWEN3, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
        ["use_sliding_window=null contradicts layer_types"],
    ),
    "layer types of llama": ({"layer_types": ["sliding_attention"] * 2}, ["layer_types", "all full_attention"]),
    "layer types of other layers": ({"layer_types": ["full_attention"]}, ["layer_types", "2 layers"]),
    "layer types a number": ({"layer_types": 5}, ["layer_types=5", "`array | null`"]),
    "rope": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        ['rope_type="dynamic"', "llama3, yarn, longrope"],
    ),
    "rope beside rope_parameters": ({"rope_parameters": {}, "rope_scaling": {"type": "dynamic"}}, ['"dynamic"']),
    "rope without factor": ({"rope_scaling": {"rope_type": "linear"}}, ["factor is missing"]),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope=", "one RoPE"]),
    "rope a list": ({"rope_scaling": ["linear"]}, ["rope_scaling", "`object | null`"]),
    "text for a factor": ({"rope_scaling": {**LINEAR, "factor": "4"}}, ['factor="4"']),
    "theta null": ({"rope_theta": None}, ["rope_theta=null"]),
    "part of a head rotated": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    "activation": ({"hidden_act": "relu"}, ["hidden_act=relu", "silu"]),
    "activation of a wrong type": ({"hidden_act": []}, ["hidden_act=[]"]),
    "missing size": ({"hidden_size": None}, ["hidden_size=null"]),
    "text for a size": ({"hidden_size": "28"}, ['hidden_size="28"']),
    "text for a truth": ({"tie_word_embeddings": "false"}, ['tie_word_embeddings="false"']),
    "half a layer": ({"num_hidden_layers": 1.5}, ["num_hidden_layers=1.5"]),
    "no heads": ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
    "heads": ({"num_attention_heads": 7}, ["model.num_heads=7", "model.num_heads=8"]),
    "heads narrower than one": ({"num_attention_heads": 64, "head_dim": None}, ["head_dim=0"]),
    "size beyond int64": ({"hidden_size": 10**400}, ["hidden_size=1000"]),
    "size beyond any target": (
        {"vocab_size": 2 * 10**9, "hidden_size": 2 * 10**9},
        ["bytes", "use a smaller model.vocab_size"],
    ),
    "layers beyond any target": (
        {"num_hidden_layers": 2 * 10**9, "hidden_size": 10**6},
        ["bytes", "num_layers=2000000000"],
    ),
    "number that is not finite": ({"rms_norm_eps": float("inf")}, ["rms_norm_eps=Infinity"]),
    "dtype": ({"torch_dtype": "float31"}, ['torch_dtype="float31"', "bfloat16"]),
    "dtype a number": ({"torch_dtype": 5}, ["torch_dtype=5"]),
}


def write_config(folder, changes: dict):
    """Writes MODEL's config.json, changed; returns its path."""
    path = folder / "config.json"
    raw = config_json(MODEL, "float32") | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value != ABSENT}))
    return path


@pytest.mark.parametrize("case", READ)
def test_keys_are_read_as_by_transformers(case, tmp_path):
    changes, desired = READ[case]
    write_config(tmp_path, changes)
    assert hf.read_config(tmp_path) == dataclasses.replace(MODEL, **desired)


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_refused(case, tmp_path):
    changes, words = REFUSED[case]
    path = write_config(tmp_path, changes)
    with pytest.raises(ConfigError) as refused:
        hf.read_config(tmp_path)
    assert "\n" not in str(refused.value)
    for word in (str(path), *words):
        assert word in str(refused.value)


OURS_ALONE = ("no model_type", "heads null")
"""what transformers refuses, though it has one meaning"""


@pytest.mark.index
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", [case for case in READ if case not in OURS_ALONE])
def test_transformers_reads_the_same(case, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write_config(tmp_path, READ[case][0])
    ours, theirs = hf.read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    desired = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert desired == dict(shapes(param_tree(ours, place_case("single"))))
    rope = type(model.model.rotary_emb)(theirs)
    assert rope.attention_scaling == 1.0
    desired = rope.inv_freq.numpy()
    np.testing.assert_allclose(frequencies(ours.head_dim, ours.rope_theta, ours.rope_scaling), desired, rtol=1e-5)
    assert {layer.input_layernorm.variance_epsilon for layer in model.model.layers} == {ours.norm_eps}
    assert {getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers} <= {None, ours.window}
    assert model.config.hidden_act in ("silu", "gelu_new")
    assert ours.activation == ("silu" if model.config.hidden_act == "silu" else "gelu")


@pytest.mark.index
def test_every_key_of_transformers_classes_is_decided():
    """A key of a newer release is decided before it is supported."""
    transformers = pytest.importorskip("transformers")
    read = {field.name for field in msgspec.structs.fields(hf_config.Keys)} | {"architectures"}
    for model_type, family in FAMILIES.items():
        theirs = transformers.AutoConfig.for_model(model_type)
        fields = {field.name: field.default for field in dataclasses.fields(theirs)}
        assert fields.keys() - read - set(hf_config.REFUSED) - set(family.refused) - set(hf_config.IGNORED) == set()
        ours = {f.name: f.default for f in msgspec.structs.fields(hf_config.Keys) if not f.required}
        ours = {key: value for key, value in (ours | dict(family.defaults)).items() if key in fields}
        ours.pop("use_sliding_window", None)  # null here: not said, which mistral takes as true
        assert {key: fields[key] for key in ours} == ours
        for key, (value, _) in family.refused.items():
            assert fields[key] == value or not (fields[key] or value)
        ropes = {"full_attention": theirs.rope_parameters} if not family.two_ropes else theirs.rope_parameters
        assert ropes["full_attention"]["rope_theta"] == family.defaults.get("rope_theta", 10_000.0)
        if family.two_ropes:
            assert ropes["sliding_attention"]["rope_theta"] == family.defaults["rope_local_base_freq"]


TEXTS = {
    "a key twice": ('{"hidden_size": 8, "hidden_size": 16}', "'hidden_size' stands twice"),
    "nested without end": ("[" * 100_000, "nested too deeply"),
    "a list": ("[]", "Expected `object`"),
    "no JSON": ("version https://git-lfs", "JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_what_is_no_config_is_refused(case, tmp_path):
    text, words = TEXTS[case]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        hf.read_config(tmp_path)


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()],
    ids=["FIFO", "zero", "dir"],
)
def test_what_is_no_regular_file_is_refused(make, tmp_path):
    make(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json is not a regular file"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "desired"),
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": ABSENT}, "bfloat16"),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_the_newer_name_of_dtype_comes_first(changes, desired, tmp_path):
    write_config(tmp_path, changes)
    assert read_dtype(tmp_path) == desired


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kind": "dynamic"},
        {"factor": 0.0},
        {"low_freq_factor": 4.0},
        {"original_context": -1},
        {"beta_fast": 0.5},
        {"factor": 2.0},
        {"fraction": 1.5},
        {"original_context": 1, "kind": "longrope"},
        {"attention_factor": 0.0},
    ],
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


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_window_is_written_as_it_is_read(qk_norm, tmp_path):
    model = dataclasses.replace(MODEL, window=8, qk_norm=qk_norm)
    (tmp_path / "config.json").write_text(json.dumps(config_json(model, "float32")))
    assert hf.read_config(tmp_path) == model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_softcap": 50.0}, "attention_softcap=50.0 .* of llama, .* use model.attention_softcap=None"),
        ({"attention_sinks": True}, "attention_sinks=True .* use model.attention_sinks=False"),
        ({"norms": "post"}, "norms=post .* use model.norms=pre"),
        ({"qkv_bias": True, "qk_norm": True}, "qk_norm=True .* of qwen2, .* use model.qk_norm=False"),
        ({"rope_scaling": RopeScaling(fraction=0.5), "qk_norm": True}, "rope_scaling.fraction=0.5 .* use .*=1.0"),
        (
            {"experts": ExpertsConfig(number=8, shared=1)},
            "experts.shared=1 .* of mixtral, .* use model.experts.shared=0",
        ),
        ({"activation": "clamped_swiglu"}, "activation=clamped_swiglu .* of llama, .* use model.activation=silu"),
        ({"out_bias": True}, "out_bias=True .* use model.out_bias=False"),
        ({"experts": ExpertsConfig(number=8, router_bias=True)}, "experts.router_bias=True .* use .*=False"),
        ({"experts": ExpertsConfig(number=8, normalize=False)}, "experts.normalize=False .* use .*=True"),
        (
            {"layer_kinds": ("full", "sliding"), "window": 8, "qkv_bias": True, "attention_scale": 0.1},
            "attention_scale",
        ),
    ],
)
def test_what_no_family_has_is_not_written(changes, words):
    with pytest.raises(ConfigError, match=f"model.{words}"):
        config_json(dataclasses.replace(MODEL, **changes), "float32")
