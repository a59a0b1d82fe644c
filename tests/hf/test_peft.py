"""Adapters in peft's format: written and read under every layout, merged as peft merges them, refused in one line."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.builders.arrays import F32_TOLERANCE, normal, place_case, relative_error
from tests.builders.folders import FAMILIES, LLAMA, QWEN, place_params, save_folder
from tests.builders.fuzz import check_door
from tsp_jax.config import LoraConfig, ModelConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hf.peft import CONFIG, load_adapters, read_adapter_config, save_adapters
from tsp_jax.hf.weights import save_params
from tsp_jax.layout import Placement
from tsp_jax.models.lora import merge
from tsp_jax.models.transformer import Transformer
from tsp_jax.stored import abstract_logical, paddings, to_logical, to_stored

LORA = LoraConfig(rank=3, alpha=2.0, targets=("q", "v", "o", "up", "down"))


def place_adapters(config: ModelConfig, placement: Placement) -> tuple[dict, dict]:
    """(random adapters in stored form on the devices, their paddings)."""
    model = nnx.eval_shape(lambda: Transformer(config, placement=placement, adapters=LORA, rngs=nnx.Rngs(0)))
    pads, stored = (tree["adapters"] for tree in (paddings(nnx.state(model)), nnx.to_pure_dict(nnx.state(model))))
    leaves, tree = jax.tree.flatten(abstract_logical(pads, stored))
    values = jax.tree.unflatten(tree, [jnp.asarray(normal(seed, *leaf.shape)) for seed, leaf in enumerate(leaves)])
    return jax.device_put(to_stored(pads, values), jax.tree.map(lambda leaf: leaf.sharding, stored)), pads


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Adapters of a model whose heads and rows are padded on eight tensor ranks."""
    placement = place_case("tp8")
    made = tmp_path_factory.mktemp("peft") / "adapters"
    save_adapters(made, place_adapters(QWEN, placement)[0], QWEN, LORA, placement, base="models/qwen")
    return made


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "tsp4", "mix2_4"])
def test_adapters_are_the_same_under_every_layout(layout, folder):
    placement = place_case(layout)
    assert read_adapter_config(folder) == LORA
    wanted, pads = place_adapters(QWEN, placement)
    loaded = load_adapters(folder, QWEN, LORA, placement)
    jax.tree.map(np.testing.assert_array_equal, to_logical(pads, loaded), to_logical(pads, wanted))
    for array, other in zip(*map(jax.tree.leaves, (loaded, wanted)), strict=True):
        assert array.sharding.is_equivalent_to(other.sharding, array.ndim)


REFUSED = {
    "another model": (LLAMA, LORA, "tensor base_model.model.model.layers.0.* has shape .*, the model needs"),
    "rank": (QWEN, LoraConfig(rank=4, alpha=2.0, targets=LORA.targets), "lora.rank=4: the adapters in .* have 3"),
    "alpha": (QWEN, LoraConfig(rank=3, targets=LORA.targets), "lora.alpha=16.0: the adapters in .* have 2.0"),
    "targets": (QWEN, LoraConfig(rank=3, alpha=2.0), r"lora.targets=\('q', .*: the adapters in .* have \('q', 'v'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_of_another_model_or_run_are_refused(case, folder):
    config, lora, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words) as refused:
        load_adapters(folder, config, lora, place_case("single"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("use_dora", True, "use_dora=True is not supported; use adapters with use_dora=null"),
        ("use_rslora", True, "use_rslora=True"),
        ("bias", "all", "bias='all' is not supported; use adapters with bias=none"),
        ("init_lora_weights", "pissa", "init_lora_weights='pissa' is not supported"),
        ("modules_to_save", ["lm_head"], "modules_to_save="),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern="),
        ("peft_type", "IA3", "peft_type='IA3' is not supported; use adapters with peft_type=LORA"),
        ("target_modules", ["embed_tokens"], "target_modules has 'embed_tokens'; use only q_proj"),
        ("target_modules", "all-linear", "target_modules"),
        ("r", 0, "r"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_key(key, value, words, copied):
    path = copied / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=words):
        read_adapter_config(copied)


def test_a_missing_file_is_named(copied):
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_model.safetensors"):
        load_adapters(copied, QWEN, LORA, place_case("single"))


def test_damaged_configurations_are_refused_in_a_line(copied):
    path = copied / CONFIG

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_adapter_config(copied)

    check_door(read, [path.read_bytes()], (ConfigError,), count=200)


@pytest.mark.index
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_merged_weights_are_those_of_peft(family, tmp_path):
    pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config, placement = FAMILIES[family], place_case("tsp4")
    base = save_folder(tmp_path / "base", config)
    adapters, params = place_adapters(config, placement)[0], place_params(config, placement)
    save_adapters(tmp_path / "adapters", adapters, config, LORA, placement, base=str(base))
    save_params(tmp_path / "merged", merge({**params, "adapters": adapters}, LORA, placement), config, placement)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapters").merge_and_unload().state_dict()
    for name, tensor in load(tmp_path / "merged").state_dict().items():
        assert relative_error(tensor.numpy(), theirs[name].numpy()) <= F32_TOLERANCE, name
