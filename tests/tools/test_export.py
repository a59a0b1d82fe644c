"""From a Hugging Face folder to a run and back: a folder is a configuration, and a run is exported and served."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from tests.builders.arrays import place_case
from tests.builders.folders import LLAMA, save_folder
from tests.builders.runs import numbers
from tests.builders.tokenizers import characters, save_tokenizer
from tsp_jax import inference
from tsp_jax.config import Config, DataConfig, LoraConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hf import weights as hf
from tsp_jax.tools import cli, export
from tsp_jax.tools.export import ExportOptions
from tsp_jax.tools.train import train
from tsp_jax.training import trainer
from tsp_jax.training.init_from import check_init_from
from tsp_jax.training.saved_run import is_run, load_run_params, read_run

pytestmark = pytest.mark.usefixtures("optax_promotes")

WORDS = "the quick brown fox jumps over the lazy dog. "
FLAGS = (
    "--steps 4 --batch 2 --seq-len 32 --compute-dtype float32 --layout tsp --mesh data=1,tsp=2 --checkpoint-every 2 "
    "--eval-batches 1 --optimizer.learning-rate 1e-2 --data.cache-dir CACHE --data.files TEXT --workdir RUN"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with a tokenizer, and text beside it."""
    root = tmp_path_factory.mktemp("journey")
    folder = save_folder(root / "small.model", LLAMA)
    save_tokenizer(folder, characters())
    (root / "text.txt").write_text(WORDS * 40)
    return folder


def parse(folder: Path, run: str, *more: str) -> tuple[str, Config]:
    """(name, configuration) of the command line that trains the folder's model."""
    paths = {"CACHE": folder.parent / "cache", "TEXT": folder.parent / "text.txt", "RUN": folder.parent / run}
    flags = [str(paths.get(flag, flag)) for flag in FLAGS.split()]
    return cli.parse([str(folder), *flags, *more])[:2]


@pytest.fixture(scope="module")
def run(folder) -> Config:
    """Four steps from the folder's weights, with checkpoints after two and four."""
    name, config = parse(folder, "run")
    trainer.train(config, name)
    return config


@pytest.fixture(scope="module")
def exported(run, folder) -> Path:
    out = folder.parent / "exported"
    assert export.export(run.workdir, str(out), ExportOptions(mesh="tsp=4")) == 4
    return out


def test_a_folder_is_a_configuration(folder):
    name, config = parse(folder, "none", "--model.rope-scaling.kind", "linear", "--model.rope-scaling.factor", "2")
    assert name == "small.model"
    assert (config.init_from, config.data.tokenizer) == (str(folder), str(folder))
    assert dataclasses.replace(config.model, rope_scaling=LLAMA.rope_scaling, init_std=LLAMA.init_std) == LLAMA
    assert config.model.rope_scaling.factor == 2


def test_a_folder_is_trained_on_text_that_is_named(folder):
    """The text of a configuration without files is the standard library's source."""
    name, config = parse(folder, "none")
    with pytest.raises(ConfigError, match=r"data.files='' names no text .*; use --data.files"):
        train(name, dataclasses.replace(config, data=DataConfig(tokenizer=str(folder))), None)


def test_a_configuration_needs_no_weights(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    assert cli.load_config(str(tmp_path)).model.num_params == LLAMA.num_params


def test_a_run_begins_with_the_weights_and_tokens_of_its_folder(run, folder):
    """Random weights would be as uncertain as there are tokens."""
    losses = [line["loss"] for line in numbers(Path(run.workdir)) if "loss" in line]
    name, config = parse(folder, "scratch", "--from-scratch", "--steps", "1")
    trainer.train(config, name)
    random = [line["loss"] for line in numbers(Path(config.workdir)) if "loss" in line]
    assert random[0] == pytest.approx(np.log(LLAMA.vocab_size), rel=0.05)
    assert abs(losses[0] - random[0]) > 0.5
    assert losses[-1] < losses[0]


def test_given_weights_are_evaluated_before_the_first_step(run):
    lines = numbers(Path(run.workdir))
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4]
    assert held_out[1] < held_out[0]


def test_a_working_directory_is_a_configuration_too(run):
    assert is_run(run.workdir)
    assert read_run(run.workdir) == run
    assert cli.load_config(run.workdir) == run


def test_an_export_has_the_weights_of_the_checkpoint_bit_by_bit(run, exported):
    placement = place_case("single")
    params = hf.load_params(exported, hf.read_config(exported), placement)
    chex.assert_trees_all_equal(params, load_run_params(run.workdir, run, placement, 4))
    assert json.loads((exported / "tokenizer.json").read_text())
    changed = jax.tree.map(
        lambda new, old: bool((new != old).any()), params, hf.load_params(run.init_from, LLAMA, placement)
    )
    assert all(jax.tree.leaves(changed))


def test_an_earlier_step_is_exported_when_asked_for(run, exported, tmp_path):
    assert export.export(run.workdir, str(tmp_path / "two"), ExportOptions(step=2, dtype="bfloat16")) == 2
    two = hf.load_params(tmp_path / "two", LLAMA, place_case("single"))
    wanted = load_run_params(run.workdir, run, place_case("single"), 2, "bfloat16")
    chex.assert_trees_all_equal(two, jax.tree.map(lambda array: array.astype("float32"), wanted))


def test_a_run_writes_the_text_of_its_export(run, exported):
    placement = place_case("tsp4")
    texts = [
        inference.generate(inference.load(source, placement, dtype="float32"), ["the quick"], max_new_tokens=8)[0].text
        for source in (run.workdir, exported)
    ]
    assert texts[0] == texts[1] != ""


def test_adapters_are_merged_in_an_export(folder, tmp_path):
    name, config = parse(folder, "lora", "--lora.rank", "4")
    trainer.train(config, name)
    export.export(config.workdir, str(tmp_path / "merged"), ExportOptions(layout="single", mesh="data=1"))
    placement = place_case("single")
    found, base = (hf.load_params(source, LLAMA, placement) for source in (tmp_path / "merged", folder))
    assert config.lora == LoraConfig(rank=4)
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), found, base)
    assert all(jax.tree.leaves(moved["layers"]["mlp"])) and not moved["embed"]["table"]


REFUSED = {
    "no run": (lambda run, out: ("nowhere", out, {}), "nowhere/config.json does not exist"),
    "no such step": (lambda run, out: (run, out, {"step": 3}), "step=3 has no checkpoint in .*; use one of 2, 4"),
    "out is not empty": (lambda run, out: (run, out.parent, {}), "exists already; use another one"),
    "negative step": (lambda run, out: (run, out, {"step": -1}), "step=-1 must not be negative"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_exports_are_refused(case, run, tmp_path):
    make, words = REFUSED[case]
    (tmp_path / "file").write_text("")
    workdir, out, options = make(run.workdir, tmp_path / "out")
    with pytest.raises(ConfigError, match=words):
        export.export(workdir, str(out), ExportOptions(**options))
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    copy = Path(shutil.copytree(run.workdir, tmp_path / "run"))
    (copy / "checkpoints/4/meta.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"checkpoint 4 of .* is damaged: meta.json .*; use step=2"):
        export.export(str(copy), str(tmp_path / "out"))


def test_fields_of_another_version_are_refused(run, tmp_path):
    content = json.loads((Path(run.workdir) / "config.json").read_text())
    content["data"]["shards"] = 3
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"data.shards is not a field of this version"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"rope_theta": 2e4}, "model.rope_theta=20000.0, was 10000.0 in init_from="),
        ({"rope_theta": 5e3}, ""),
    ],
)
def test_only_the_base_of_a_longer_context_may_differ(change, line, folder):
    config = parse(folder, "none")[1]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    if not line:
        with pytest.raises(ConfigError, match=r"model.rope_theta=5000.0, .* has 10000.0"):
            check_init_from(config, place_case("tsp2"))
    else:
        (found,) = check_init_from(config, place_case("tsp2"))
        assert found.startswith(line)
