"""Folders of gpt-oss whose experts are in MXFP4 are read as if they were not quantized."""

import dataclasses
import json

import chex
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.builders.arrays import place_case, relative_error
from tests.builders.folders import FAMILIES, save_folder
from tests.builders.transformers_models import LOGITS_TOLERANCE, Ours, random_model, their_logits
from tsp_jax.errors import ConfigError
from tsp_jax.hf import weights as hf
from tsp_jax.hf.mxfp4 import dequantize
from tsp_jax.hf.tensors import SINGLE

CONFIG = dataclasses.replace(FAMILIES["gpt_oss"], d_model=64, d_ff=96, num_layers=1, layer_kinds=())
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
EXPERTS = "model.layers.0.mlp.experts."


def random_bytes(seed: int, experts: int, inputs: int, outputs: int):
    """(blocks, scales) of a weight whose elements are at most 24."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
    return blocks, rng.integers(118, 130, blocks.shape[:-1], np.uint8)


def by_hand(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, in, out], one element after another."""
    experts, outputs, groups, _ = blocks.shape
    weight = np.empty((experts, groups * 32, outputs), np.float32)
    for e, i, o in np.ndindex(weight.shape):
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        bits = byte >> 4 if i % 2 else byte & 15
        exponent, mantissa = bits >> 1 & 3, bits & 1
        value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        weight[e, i, o] = (-1) ** (bits >> 3) * value * 2.0 ** (int(scales[e, o, i // 32]) - 127)
    return weight


def quantize(folder, changes=lambda tensors: tensors) -> dict:
    """Replaces the experts' weights of a folder by random bytes in MXFP4; returns them, not quantized."""
    tensors, plain = load_file(folder / SINGLE), {}
    for seed, name in enumerate(("gate_up_proj", "down_proj")):
        blocks, scales = random_bytes(seed, *tensors.pop(EXPERTS + name).shape)
        tensors |= {f"{EXPERTS}{name}_blocks": blocks, f"{EXPERTS}{name}_scales": scales}
        plain[EXPERTS + name] = by_hand(blocks, scales)
    save_file(changes(tensors), folder / SINGLE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZED}))
    return plain


@pytest.mark.parametrize("layout", ["single", "tsp4", "mix2_4"])
def test_a_quantized_folder_is_read_as_its_values(layout, tmp_path):
    folder, plain = save_folder(tmp_path / "quantized", CONFIG), save_folder(tmp_path / "plain", CONFIG)
    save_file({**load_file(plain / SINGLE), **quantize(folder)}, plain / SINGLE)
    assert hf.read_config(folder) == CONFIG
    placement = place_case(layout)
    params = hf.load_params(folder, CONFIG, placement)
    chex.assert_trees_all_equal(params, hf.load_params(plain, CONFIG, placement))
    hf.save_params(tmp_path / "out", params, CONFIG, placement, source=folder, dtype="bfloat16")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    experts = hf.load_params(tmp_path / "out", CONFIG, placement)["layers"]["mlp"]
    for name in ("w_gate", "w_up", "w_down"):  # bfloat16 holds them exactly
        np.testing.assert_array_equal(experts[name], params["layers"]["mlp"][name])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"down_proj_scales": np.zeros((6, 64, 2), np.uint8)}, r"scales has shape \[6, 64, 2\], .* \[6, 64, 3\]"),
        ({"down_proj_blocks": np.zeros((6, 64, 3, 16), np.int8)}, "down_proj_blocks is I8; use weights in U8"),
        ({"down_proj_scales": None}, "has no tensor .*down_proj_scales"),
        ({"down_proj_blocks": None}, "has no tensor .*down_proj"),
        ({"down_proj": np.zeros((6, 96, 64), np.float32)}, "down_proj_.*' has no place in the model"),
    ],
)
def test_a_broken_quantized_folder_is_refused(changed, message, tmp_path):
    def change(tensors):
        tensors |= {EXPERTS + name: array for name, array in changed.items()}
        return {name: array for name, array in tensors.items() if array is not None}

    folder = save_folder(tmp_path / "quantized", CONFIG)
    quantize(folder, change)
    with pytest.raises(ConfigError, match=message) as refused:
        hf.load_params(folder, CONFIG, place_case("single"))
    assert "\n" not in str(refused.value)


def test_a_width_that_blocks_do_not_divide_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, d_ff=80)
    folder = save_folder(tmp_path / "quantized", config)
    quantize(folder)
    with pytest.raises(ConfigError, match="down_proj_blocks has blocks of 32 of 80 elements"):
        hf.check_folder(folder, config, place_case("single"))


def test_bytes_are_read_as_bfloat16_holds_them():
    """All pairs of 4 bits, with the smallest and a large scale."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 1, 16)
    for scale in (0, 127, 250):
        found = dequantize(blocks, np.full((1, 16, 1), scale, np.uint8))
        desired = by_hand(blocks, np.full((1, 16, 1), scale, np.uint8))
        np.testing.assert_array_equal(found.reshape(1, 16, 32).swapaxes(1, 2), desired)
        np.testing.assert_array_equal(found, found.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.index
@pytest.mark.filterwarnings("default")
def test_transformers_reads_the_same(tmp_path):
    """The values bit for bit; the logits, of a model that transformers makes bfloat16, then float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 12, "num_local_experts": 6, "num_hidden_layers": 1}
    model = random_model(transformers, "GptOss", {**sizes, "rope_scaling": {"rope_type": "default"}})
    folder = tmp_path / "quantized"
    model.to(torch.bfloat16).save_pretrained(folder)
    plain = quantize(folder)
    for seed, (name, desired) in enumerate(plain.items()):
        experts, inputs, outputs = desired.shape
        theirs = convert_moe_packed_tensors(*map(torch.from_numpy, random_bytes(seed, experts, inputs, outputs)))
        np.testing.assert_array_equal(theirs.float().numpy(), desired, err_msg=name)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    tokens = np.random.default_rng(0).integers(0, 144, (2, 96))
    found = Ours(folder, place_case("tsp4")).logits(tokens)
    assert relative_error(found, their_logits(again.float(), tokens)) <= LOGITS_TOLERANCE
