"""Weights in and out bit for bit, each device its shard; broken folders are refused in a line."""

import dataclasses
import json
import math
import os
import re
import resource
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.builders.arrays import place_case
from tests.builders.folders import FAMILIES, LLAMA, MODELS, QWEN, logical_params, place_params, save_folder
from tsp_jax.errors import ConfigError
from tsp_jax.hf import families as hf_families
from tsp_jax.hf import tensors as hf_tensors
from tsp_jax.hf import weights as hf
from tsp_jax.hf.config import read_model_type
from tsp_jax.hf.params import param_tree
from tsp_jax.hf.tensors import INDEX, SINGLE, split_files


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("there", "here"), [("tsp4", "tp8"), ("tp8", "single"), ("single", "tsp8"), ("tsp8", "tsp3")])
def test_export_and_import_are_bitwise_under_any_layout(model, there, here, tmp_path):
    config, placement = MODELS[model], place_case(here)
    folder = save_folder(tmp_path / "out", config, there, max_file_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert hf.read_config(folder) == config
    params, desired = hf.load_params(folder, config, placement), place_params(config, placement)
    chex.assert_trees_all_equal(params, desired)
    alike = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), params, desired)
    assert all(jax.tree.leaves(alike))


def test_tensors_have_the_names_and_shapes_of_hugging_face(tmp_path):
    params, tensors = logical_params(QWEN), load_file(save_folder(tmp_path / "out", QWEN, "tsp4") / SINGLE)
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


NORMS = {
    "pre": {"attention_norm": "input", "mlp_norm": "post_attention"},
    "post": {"attention_post_norm": "post_attention", "mlp_post_norm": "post_feedforward"},
    "both": {
        "attention_norm": "input", "attention_post_norm": "post_attention", "mlp_norm": "pre_feedforward",
        "mlp_post_norm": "post_feedforward",
    },
}  # fmt: skip


@pytest.mark.parametrize("norms", NORMS)
def test_norms_have_the_names_of_their_place(norms, tmp_path):
    config = FAMILIES[{"pre": "llama", "post": "olmo2", "both": "gemma2"}[norms]]
    params, tensors = logical_params(config), load_file(save_folder(tmp_path / "out", config) / SINGLE)
    assert sum("layernorm" in name for name in tensors) == config.num_layers * len(NORMS[norms])
    for ours, theirs in NORMS[norms].items():
        name = f"model.layers.1.{theirs}_layernorm.weight"
        np.testing.assert_array_equal(tensors[name], params["layers"][ours]["scale"][1], err_msg=name)


@pytest.mark.parametrize("layout", ["single", "tsp8", "tp8"])
def test_phi3_has_queries_keys_and_values_in_one_tensor_and_gate_and_up_in_another(layout, tmp_path):
    config = FAMILIES["phi3"]
    params, tensors = (
        logical_params(config)["layers"],
        load_file(save_folder(tmp_path / "out", config, layout) / SINGLE),
    )
    for name, parts in {
        "self_attn.qkv_proj": [params["attention"][part] for part in ("w_q", "w_k", "w_v")],
        "mlp.gate_up_proj": [params["mlp"][part] for part in ("w_gate", "w_up")],
    }.items():
        desired = np.concatenate([part[1] for part in parts])
        np.testing.assert_array_equal(tensors[f"model.layers.1.{name}.weight"], desired)
    assert not any(".q_proj" in name or ".gate_proj" in name for name in tensors)


EXPERTS = {
    "mixtral": ["block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2"))],
    "qwen3_moe": ["mlp.gate", *(f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down"))],
    "granitemoe": [f"block_sparse_moe.{name}" for name in ("router.layer", "input_linear", "output_linear")],
}


@pytest.mark.parametrize("layout", ["single", "tsp8", "tp4"])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_in_tensors_of_their_own_or_in_one(family, layout, tmp_path):
    config = FAMILIES[family]
    mlp = logical_params(config)["layers"]["mlp"]
    tensors = load_file(save_folder(tmp_path / "out", config, layout) / SINGLE)
    gate, up, down = (mlp[f"w_{name}"][1].reshape(config.experts.number, 14, -1) for name in ("gate", "up", "down"))
    down = np.swapaxes(down, 1, 2)
    router, *parts = EXPERTS[family]
    arrays = [gate, up, down] if len(parts) == 3 else [np.concatenate([gate, up], axis=1), down]
    desired = {router: mlp["router"][1]}
    for name, array in zip(parts, arrays, strict=True):
        desired |= {name.format(expert): part for expert, part in enumerate(array)} if "{}" in name else {name: array}
    for name, array in desired.items():
        np.testing.assert_array_equal(tensors[f"model.layers.1.{name}.weight"], array, err_msg=name)


@pytest.mark.parametrize("layout", ["single", "tsp8", "tp4"])
def test_gates_and_ups_of_gpt_oss_alternate(layout, tmp_path):
    config = FAMILIES["gpt_oss"]
    mlp = logical_params(config)["layers"]["mlp"]
    tensors = load_file(save_folder(tmp_path / "out", config, layout) / SINGLE)
    gate, up, down = (mlp[f"w_{name}"][1].reshape(6, 31, -1) for name in ("gate", "up", "down"))
    pairs = np.stack([gate, up], axis=2).reshape(6, 62, -1)
    biases = np.stack([mlp["gate_bias"][1].reshape(6, 31), mlp["up_bias"][1].reshape(6, 31)], axis=2).reshape(6, 62)
    for name, array in {
        "experts.gate_up_proj": np.swapaxes(pairs, 1, 2), "experts.down_proj": down,
        "experts.gate_up_proj_bias": biases, "experts.down_proj_bias": mlp["down_bias"][1],
        "router.weight": mlp["router"][1], "router.bias": mlp["router_bias"][1],
    }.items():  # fmt: skip
        np.testing.assert_array_equal(tensors[f"model.layers.1.mlp.{name}"], array, err_msg=name)


@pytest.mark.parametrize("layout", ["single", "tsp8", "tp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exported_and_imported_bitwise(family, layout, tmp_path):
    config, placement = FAMILIES[family], place_case(layout)
    folder = save_folder(tmp_path / "out", config, "tsp4", max_file_bytes=20_000)
    assert hf.read_config(folder) == config
    chex.assert_trees_all_equal(hf.load_params(folder, config, placement), place_params(config, placement))


def test_a_fused_tensor_of_another_shape_is_refused(tmp_path):
    folder, name = save_folder(tmp_path / "out", FAMILIES["phi3"]), "model.layers.0.self_attn.qkv_proj.weight"
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, name: tensors[name][1:].copy()}, folder / SINGLE)
    with pytest.raises(ConfigError, match=r"qkv_proj.weight has shape \[191, 28\], the model needs \[192, 28\]"):
        hf.load_params(folder, FAMILIES["phi3"], place_case("tsp4"))


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_bfloat16_files_are_read_into_any_dtype(asked, tmp_path):
    folder, placement = save_folder(tmp_path / "out", QWEN, dtype="bfloat16"), place_case("tsp4")
    params = hf.load_params(folder, QWEN, placement, asked)
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16).astype(asked), place_params(QWEN, placement))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(asked)}
    chex.assert_trees_all_equal(params, rounded)


def test_tokenizer_and_token_ids_are_taken_along(tmp_path):
    source = save_folder(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "eos_token_id": [3, 5], "max_position_embeddings": 640}))
    folder = save_folder(tmp_path / "out", source=source)
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


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama", "tsp8"), ("padded_tied_qwen", "tsp4"), ("scaled", "tp8"), ("mixtral", "tsp4"), ("qwen3_moe", "tp8"),
        ("granitemoe", "tsp4"), ("granitemoe", "mix2_4"), ("gpt_oss", "mix2_4"),
    ],
)  # fmt: skip
def test_each_device_reads_its_own_slice(model, layout, tmp_path, monkeypatch):
    config, placement, reads = (FAMILIES | MODELS)[model], place_case(layout), []
    folder = save_folder(tmp_path / "out", config)
    family = hf_families.FAMILIES[read_model_type(folder)]
    plain = hf_tensors.open_file
    monkeypatch.setattr(hf_tensors, "open_file", lambda path: CountedFile(plain(path), reads))
    hf.load_params(folder, config, placement)
    most, whole = {}, {name: tensor.size for name, tensor in load_file(folder / SINGLE).items()}
    for param in jax.tree.leaves(param_tree(config, placement, family)):
        slice_of_a_layer = param.stored.sharding.shard_shape(param.stored.shape)[param.stacked :]
        most |= dict.fromkeys(param.names(), math.prod(slice_of_a_layer))
    pairs = [name for name in whole if "gate_up_proj" in name]  # what lies between a device's elements is read too
    assert [name for name, size in reads if size > most[name] * (1 + (name in pairs))] == []
    everywhere = "norm", "mlp.gate.", "moe.gate.", "router", "sinks", "proj.bias", "down_proj_bias"
    copies = {name: placement.size("heads") if any(part in name for part in everywhere) else 1 for name in whole}
    found = {name: sum(size for read, size in reads if read == name) for name in whole}
    assert all(whole[name] < found.pop(name) < 2 * whole[name] for name in pairs)
    assert {name: whole[name] * copies[name] for name in found} == found


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


def _replace(path: Path, make) -> None:
    path.unlink()
    make(path)


def _link_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _unlisted(content):
    return {"weight_map": {k: v for k, v in content["weight_map"].items() if k != NORM}}


NORM = "model.norm.weight"


def _without_norm(folder: Path) -> None:
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][NORM]
    save_file({name: tensor for name, tensor in load_file(path).items() if name != NORM}, path)
    _index(_unlisted)(folder)


Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
BAD_FOLDERS = {
    "no files": (lambda f: [path.unlink() for path in [*f.glob("*.safetensors"), f / INDEX]], ["neither", SINGLE]),
    "a file missing": (lambda f: max(f.glob("*.safetensors")).unlink(), ["does not exist", "-of-"]),
    "a file cut short": (_truncate, ["not an intact safetensors file", "-of-"]),
    "a file of something else": (lambda f: max(f.glob("*.safetensors")).write_text("<html>"), ["not an intact"]),
    "index broken": (lambda f: (f / INDEX).write_text("{"), [INDEX, "JSON"]),
    "index empty": (_index(lambda content: {}), [INDEX, "weight_map"]),
    "index a list": (_index(lambda content: [1]), [INDEX, "Expected `object`"]),
    "index without tensors": (_index(lambda content: {"weight_map": {}}), [INDEX, "weight_map={}"]),
    "number for a file": (_index(lambda content: {"weight_map": {"a": 1}}), [INDEX, "weight_map", "`int`"]),
    "name too long": (_index(lambda content: {"weight_map": {"a": "x" * 5000}}), [INDEX, "no file of the folder"]),
    "file of two lines": (_index(lambda content: {"weight_map": {"a": "x\ny"}}), [INDEX, "no file of the folder"]),
    "parent folder": (_index(lambda content: {"weight_map": {"a": ".."}}), [INDEX, "no file of the folder"]),
    "index is a FIFO": (lambda f: _replace(f / INDEX, os.mkfifo), [INDEX, "not a regular file"]),
    "file is a FIFO": (lambda f: _replace(max(f.glob("*.safetensors")), os.mkfifo), ["-of-", "not a regular file"]),
    "file is a device": (lambda f: _replace(max(f.glob("*.safetensors")), _link_zero), ["not a regular file"]),
    "file is a folder": (lambda f: (f / SINGLE).mkdir(), [SINGLE, "not a regular file"]),
    "index leaves the folder": (_index(lambda content: {"weight_map": {"a": "../a"}}), [INDEX, "../a"]),
    "tensor in neither": (_without_norm, ["no tensor model.norm.weight"]),
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


def test_tensors_that_the_index_leaves_out_are_read(folder):
    _index(_unlisted)(folder)
    placement = place_case("single")
    chex.assert_trees_all_equal(hf.load_params(folder, LLAMA, placement), place_params(LLAMA, placement))


@pytest.mark.parametrize("other", [False, True])
def test_a_tied_model_may_hold_its_table_twice_but_no_other_head(other, tmp_path):
    folder, placement = save_folder(tmp_path / "out", QWEN), place_case("tsp4")
    tensors = load_file(folder / SINGLE)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += other
    save_file({**tensors, "lm_head.weight": head}, folder / SINGLE)
    if other:
        with pytest.raises(ConfigError, match=r"lm_head\.weight is not .* use tie_word_embeddings=false"):
            hf.load_params(folder, QWEN, placement)
    else:
        chex.assert_trees_all_equal(hf.load_params(folder, QWEN, placement), place_params(QWEN, placement))


HUGE = {
    "layers": ({"num_layers": 10**7}, "has no tensor model.layers.2."),
    "vocabulary": ({"vocab_size": 2 * 10**9}, "[72, 28], the model needs [2000000000, 28]"),
    "heads": ({"num_heads": 10**8, "num_kv_heads": 10**8, "d_model": 28}, "the model needs"),
    "width of heads": ({"head_dim": 2 * 10**9}, "the model needs"),
}


@pytest.mark.parametrize("case", HUGE)
def test_weights_that_contradict_huge_sizes_are_refused_first(case, folder):
    """Before anything of those sizes is built: names of layers, numbers of rows."""
    changes, words = HUGE[case]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=re.escape(words)):
        hf.load_params(folder, dataclasses.replace(LLAMA, **changes), place_case("tsp8"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_folders_that_are_not_there_are_refused(tmp_path):
    for read in (hf.read_config, lambda folder: hf.load_params(folder, LLAMA, place_case("single"))):
        with pytest.raises(ConfigError, match=r"config\.json does not exist"):
            read(tmp_path / "nowhere")


def test_an_export_is_whole_or_absent(tmp_path, monkeypatch):
    taken = save_folder(tmp_path / "taken")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="taken exists already"):
        save_folder(taken)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(ConfigError, match=r"cannot be written \(disk full"):
        save_folder(tmp_path / "out")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [taken]


def test_an_export_to_a_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    placement = place_case("single")
    with pytest.raises(ConfigError, match="folder=s3://bucket/model is not on a file system"):
        hf.save_params("s3://bucket/model", place_params(LLAMA, placement), LLAMA, placement)
    assert not list(tmp_path.iterdir())
