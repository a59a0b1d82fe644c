"""Hugging Face folders: in and out bit for bit, a device's slice at a time; what is wrong is refused in a line."""

import dataclasses
import json
import math
import re
from pathlib import Path

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from tests.builders.arrays import F32_TOLERANCE, assert_trees_near, normal, place_case
from tsp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.heads import paddings, to_stored
from tsp_jax.hf import files as hf_files
from tsp_jax.hf import weights as hf
from tsp_jax.hf.config import config_json
from tsp_jax.hf.files import INDEX, SINGLE, split_files
from tsp_jax.hf.gguf import convert_gguf
from tsp_jax.layout import Placement
from tsp_jax.models.transformer import Transformer
from tsp_jax.ops.rope import frequencies
from tsp_jax.training.init_from import check_init_from, init_state
from tsp_jax.training.step import make_program

# No two of V, D, F, N H and K H are alike, nor what 8 ranks have of them.
LLAMA = ModelConfig(vocab_size=72, d_model=28, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=12, d_ff=120)
QWEN = dataclasses.replace(LLAMA, num_heads=9, num_kv_heads=3, qk_norm=True, tie_embeddings=True)
SCALED = dataclasses.replace(
    LLAMA, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=64), activation="gelu"
)
MODELS = {"llama": LLAMA, "padded_tied_qwen": QWEN, "scaled": SCALED}


def state_of(config: ModelConfig, placement: Placement) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Transformer(config, placement=placement, rngs=nnx.Rngs(0))))


def logical_params(config: ModelConfig) -> dict:
    """Random, norm scales too."""
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state_of(config, place_case("single"))))
    return jax.tree.unflatten(tree, [normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])


def place_params(config: ModelConfig, placement: Placement) -> dict:
    """Those in stored form, on the devices."""
    state = state_of(config, placement)
    stored = to_stored(paddings(state), jax.tree.map(jnp.asarray, logical_params(config)))
    return jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), stored, nnx.to_pure_dict(state))


def save(folder: Path, config: ModelConfig = LLAMA, layout: str = "single", **kwargs) -> Path:
    placement = place_case(layout)
    hf.save_params(folder, place_params(config, placement), config, placement, **kwargs)
    return folder


def assert_same(actual, desired) -> None:
    chex.assert_trees_all_equal(actual, desired)


# ------------------------------------------------------------------------------------------------ in and out


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("there", "here"), [("tsp4", "tp8"), ("tp8", "single"), ("single", "tsp8"), ("tsp8", "tsp3")])
def test_export_and_import_are_bitwise_under_any_layout(model, there, here, tmp_path):
    config, placement = MODELS[model], place_case(here)
    folder = save(tmp_path / "out", config, there, max_file_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert hf.read_config(folder) == config
    params, desired = hf.load_params(folder, config, placement), place_params(config, placement)
    assert_same(params, desired)
    alike = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), params, desired)
    assert all(jax.tree.leaves(alike))


def test_tensors_have_the_names_and_shapes_of_hugging_face(tmp_path):
    params, tensors = logical_params(QWEN), load_file(save(tmp_path / "out", QWEN, "tsp4") / SINGLE)
    layer = "model.layers.1."
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    assert len(tensors) == 2 + QWEN.num_layers * 11
    for name, desired in {
        "model.embed_tokens.weight": params["embed"]["table"],
        "model.norm.weight": params["final_norm"]["scale"],
        f"{layer}input_layernorm.weight": params["layers"]["attention_norm"]["scale"][1],
        f"{layer}post_attention_layernorm.weight": params["layers"]["mlp_norm"]["scale"][1],
        f"{layer}self_attn.q_proj.weight": attention["w_q"][1],
        f"{layer}self_attn.o_proj.weight": attention["w_o"][1].T,
        f"{layer}self_attn.k_norm.weight": attention["k_norm"][1],
        f"{layer}mlp.gate_proj.weight": mlp["w_gate"][1],
        f"{layer}mlp.down_proj.weight": mlp["w_down"][1].T,
    }.items():
        np.testing.assert_array_equal(tensors[name], desired, err_msg=name)


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_bfloat16_files_are_read_into_any_dtype(asked, tmp_path):
    folder, placement = save(tmp_path / "out", QWEN, dtype="bfloat16"), place_case("tsp4")
    params = hf.load_params(folder, QWEN, placement, asked)
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(asked), place_params(QWEN, placement))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(asked)}
    assert_same(params, rounded)


def test_tokenizer_and_token_ids_are_taken_along(tmp_path):
    source = save(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "eos_token_id": [3, 5], "max_position_embeddings": 640}))
    folder = save(tmp_path / "out", source=source)
    assert (folder / "tokenizer.json").read_text() == "{}"
    written = json.loads((folder / "config.json").read_text())
    assert (written["eos_token_id"], written["max_position_embeddings"]) == ([3, 5], 640)


def test_files_are_split_by_size():
    assert split_files({"a": 3, "b": 3, "c": 4, "d": 9, "e": 1}, 7) == [["a", "b"], ["c"], ["d"], ["e"]]


class CountedFile:
    """A safetensors file that notes the size of every read."""

    def __init__(self, file, reads: list[tuple[str, int]]):
        self.file, self.reads = file, reads

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        counted, tensor = self, self.file.get_slice(name)

        class Slice:
            get_shape, get_dtype = tensor.get_shape, tensor.get_dtype

            def __getitem__(self, index):
                value = tensor[index]
                counted.reads.append((name, value.size))
                return value

        return Slice()


@pytest.mark.parametrize(("model", "layout"), [("llama", "tsp8"), ("padded_tied_qwen", "tsp4"), ("scaled", "tp8")])
def test_each_device_reads_its_own_slice(model, layout, tmp_path, monkeypatch):
    config, placement, reads = MODELS[model], place_case(layout), []
    folder = save(tmp_path / "out", config)
    plain = hf_files.open_file
    monkeypatch.setattr(hf_files, "open_file", lambda path: CountedFile(plain(path), reads))
    hf.load_params(folder, config, placement)
    most, whole = {}, {name: tensor.size for name, tensor in load_file(folder / SINGLE).items()}
    for param in jax.tree.leaves(hf._param_tree(config, placement)):
        slice_of_a_layer = param.stored.sharding.shard_shape(param.stored.shape)[param.stacked :]
        most |= dict.fromkeys(param.names, math.prod(slice_of_a_layer))
    assert [name for name, size in reads if size > most[name]] == []
    copies = {name: placement.size("heads") if "norm" in name else 1 for name in whole}
    assert {name: size * copies[name] for name, size in whole.items()} == {
        name: sum(size for read, size in reads if read == name) for name in whole
    }


# ------------------------------------------------------------------------------------------------ RoPE


def test_llama3_frequencies_follow_the_formula():
    """As Llama's own code writes it, a branch at a time."""
    scaling = RopeScaling(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    scaled, seen = [], set()
    for frequency in 500_000.0 ** -(np.arange(64) / 64):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4.0:
            scaled.append(frequency)
            seen.add("kept")
        elif wavelength > 8192 / 1.0:
            scaled.append(frequency / 32.0)
            seen.add("divided")
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            scaled.append((1 - smooth) * frequency / 32.0 + smooth * frequency)
            seen.add("between")
    assert seen == {"kept", "divided", "between"}
    np.testing.assert_allclose(frequencies(128, 500_000.0, scaling), scaled, rtol=F32_TOLERANCE)


def test_linear_frequencies_are_divided():
    plain, scaled = (frequencies(24, 1e4, scaling) for scaling in (RopeScaling(), RopeScaling(kind="linear", factor=4)))
    np.testing.assert_array_equal(scaled, plain / 4)


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


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder of several files, to be copied."""
    return save(tmp_path_factory.mktemp("hf") / "intact", max_file_bytes=20_000)


@pytest.fixture
def folder(intact, tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for file in intact.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    return made


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


def _tensors(change):
    """Rewrites the file that holds layer 1's o_proj."""

    def apply(folder: Path) -> None:
        path = folder / json.loads((folder / INDEX).read_text())["weight_map"][O_PROJ]
        save_file(change(load_file(path), O_PROJ), path)

    return apply


def _index(change):
    def apply(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(content)))

    return apply


def _truncate(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])


def _unlisted(content):
    return {"weight_map": {k: v for k, v in content["weight_map"].items() if k != "model.norm.weight"}}


Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
BAD_FOLDERS = {
    "no files": (lambda f: [path.unlink() for path in [*f.glob("*.safetensors"), f / INDEX]], ["neither", SINGLE]),
    "a file missing": (lambda f: max(f.glob("*.safetensors")).unlink(), ["does not exist", "-of-"]),
    "a file cut short": (_truncate, ["not an intact safetensors file", "-of-"]),
    "a file of something else": (lambda f: max(f.glob("*.safetensors")).write_text("<html>"), ["not an intact"]),
    "index broken": (lambda f: (f / INDEX).write_text("{"), [INDEX, "JSON"]),
    "index empty": (_index(lambda content: {}), [INDEX, "no weight_map"]),
    "index leaves the folder": (_index(lambda content: {"weight_map": {"a": "../a"}}), [INDEX, "../a"]),
    "tensor not in the index": (_index(_unlisted), ["no tensor model.norm.weight"]),
    "tensor not in its file": (_tensors(lambda t, name: {k: v for k, v in t.items() if k != name}), ["lacks", O_PROJ]),
    "shape": (_tensors(lambda t, name: t | {name: t[name].T.copy()}), [O_PROJ, "[96, 28]", "[28, 96]"]),
    "dtype": (_tensors(lambda t, name: t | {name: t[name].astype(np.int8)}), [O_PROJ, "I8", "BF16"]),
    "one too many": (
        _index(lambda c: {"weight_map": c["weight_map"] | {Q_BIAS: "extra.safetensors"}}),
        ["q_proj.bias"],
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_broken_folders_are_refused(case, folder):
    save_file({Q_BIAS: np.zeros(3, np.float32)}, folder / "extra.safetensors")
    spoil, words = BAD_FOLDERS[case]
    spoil(folder)
    with pytest.raises(ConfigError) as refused:
        hf.load_params(folder, LLAMA, place_case("single"))
    assert "\n" not in str(refused.value)
    for word in (str(folder), *words):
        assert word in str(refused.value)


def test_folders_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        hf.read_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds neither"):
        hf.load_params(tmp_path / "nowhere", LLAMA, place_case("single"))


def test_a_mesh_that_does_not_divide_is_refused(folder):
    with pytest.raises(ConfigError, match=r"vocab_size=70 .* by 4 over tsp; use 2"):
        hf.load_params(folder, dataclasses.replace(LLAMA, vocab_size=70), place_case("tsp4"))


def test_an_export_is_whole_or_absent(tmp_path, monkeypatch):
    taken = save(tmp_path / "taken")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="taken exists already"):
        save(taken)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(ConfigError, match=r"cannot be written \(disk full"):
        save(tmp_path / "out")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [taken]


# ------------------------------------------------------------------------------------------------ training


def run_config(folder: Path | str, model: ModelConfig = LLAMA, workdir: str = "runs/none") -> Config:
    return Config(
        model=model, data=DataConfig(order="contiguous"), optimizer=OptimizerConfig(warmup_steps=1), steps=2, batch=2,
        seq_len=16, compute_dtype="float32", init_from=str(folder), workdir=workdir,
    )  # fmt: skip


def test_a_run_starts_from_given_weights(folder):
    placement = place_case("tsp4")
    config = run_config(folder)
    check_init_from(config, placement)
    state = init_state(config, make_program(config, placement), placement)
    assert_same(state.params, place_params(LLAMA, placement))
    assert int(state.step) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"d_ff": 240, "num_layers": 4},
            "model.num_layers=4, .* has 2; use --model.num-layers 2 --model.d-ff 120$",
        ),
        ({"num_layers": 4}, "model.num_layers=4, .* has 2; use --model.num-layers 2"),
        ({"qk_norm": True}, "model.qk_norm=True, .* has False; use --model.no-qk-norm"),
        (
            {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
            "model.rope_scaling.kind=linear, .*; use --model.rope-scaling.kind none",
        ),
    ],
)
def test_given_weights_of_another_model_are_refused(change, words, folder):
    with pytest.raises(ConfigError, match=words) as refused:
        check_init_from(run_config(folder, dataclasses.replace(LLAMA, **change)), place_case("single"))
    assert str(folder) in str(refused.value)


def test_initial_spread_may_differ_and_a_run_to_resume_needs_no_folder(folder, tmp_path):
    check_init_from(run_config(folder, dataclasses.replace(LLAMA, init_std=0.5)), place_case("single"))
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    check_init_from(run_config("nowhere", workdir=str(tmp_path / "run")), place_case("single"))


# ------------------------------------------------------------------------------------------------ GGUF


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: i of the first half, i of the second, i + 1 of the first, ..."""
    first, second = np.split(rows.reshape(heads, -1, rows.shape[-1]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


@pytest.fixture
def gguf_file(tmp_path):
    """The logical parameters of LLAMA with a byte-level tokenizer whose one merge is "he"."""
    path, params = tmp_path / "model.gguf", logical_params(GGUF_MODEL)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(GGUF_MODEL.d_model)
    writer.add_block_count(GGUF_MODEL.num_layers)
    writer.add_head_count(GGUF_MODEL.num_heads)
    writer.add_head_count_kv(GGUF_MODEL.num_kv_heads)
    writer.add_key_length(GGUF_MODEL.head_dim)
    writer.add_feed_forward_length(GGUF_MODEL.d_ff)
    writer.add_context_length(64)
    writer.add_rope_freq_base(GGUF_MODEL.rope_theta)
    writer.add_layer_norm_rms_eps(GGUF_MODEL.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(0)
    layers = params["layers"]
    writer.add_tensor("token_embd.weight", params["embed"]["table"])
    writer.add_tensor("output.weight", params["head"]["table"])
    writer.add_tensor("output_norm.weight", params["final_norm"]["scale"])
    for number in range(GGUF_MODEL.num_layers):
        attention, mlp = ({k: v[number] for k, v in layers[part].items()} for part in ("attention", "mlp"))
        for name, value in {
            "attn_norm": layers["attention_norm"]["scale"][number],
            "attn_q": pairs(attention["w_q"], GGUF_MODEL.num_heads),
            "attn_k": pairs(attention["w_k"], GGUF_MODEL.num_kv_heads),
            "attn_v": attention["w_v"],
            "attn_output": attention["w_o"].T.copy(),
            "ffn_norm": layers["mlp_norm"]["scale"][number],
            "ffn_gate": mlp["w_gate"],
            "ffn_up": mlp["w_up"],
            "ffn_down": mlp["w_down"].T.copy(),
        }.items():
            writer.add_tensor(f"blk.{number}.{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TOKENS = ["<|end|>", *"helo0123456789", "Ġ", "he", "w", "r", "d", "Ċ", "Ã", "©"]
TOKENS = list(dict.fromkeys(TOKENS))
GGUF_MODEL = dataclasses.replace(LLAMA, vocab_size=len(TOKENS))


def test_gguf_becomes_the_same_folder(gguf_file, tmp_path):
    config = convert_gguf(gguf_file, tmp_path / "out")
    assert config == GGUF_MODEL == hf.read_config(tmp_path / "out")
    params = hf.load_params(tmp_path / "out", config, place_case("single"))
    assert_trees_near(params, logical_params(GGUF_MODEL), 0.0)


def test_gguf_tokenizer_cuts_as_the_file_says(gguf_file, tmp_path):
    convert_gguf(gguf_file, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "hello 10 world<|end|>\né"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["he", *"llo", "Ġ", *"10", "Ġ", *"world", "<|end|>", "Ċ", "Ã", "©"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|end|>"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": 0}


def test_what_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    for content in (b"", b"not a GGUF file at all"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            convert_gguf(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]
