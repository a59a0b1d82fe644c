"""A run starts from the weights of a Hugging Face folder of its own model."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import chex
import numpy as np
import pytest

from tests.builders.arrays import place_case
from tests.builders.folders import FAMILIES, LLAMA, place_params, save_folder
from tsp_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.training.init_from import check_init_from, init_state
from tsp_jax.training.step import make_program


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "model")


def run_config(folder: Path | str, model: ModelConfig = LLAMA, workdir: str = "runs/none") -> Config:
    return Config(
        model=model, data=DataConfig(order="contiguous", tokenizer="bytes"), optimizer=OptimizerConfig(warmup_steps=1),
        steps=2, batch=2, seq_len=16, compute_dtype="float32", init_from=str(folder), workdir=workdir,
    )  # fmt: skip


def test_a_run_starts_from_given_weights(folder):
    placement = place_case("tsp4")
    config = run_config(folder)
    check_init_from(config, placement)
    state = init_state(config, make_program(config, placement), placement, frozen={})
    chex.assert_trees_all_equal(state.params, place_params(LLAMA, placement))
    assert int(state.step) == 0


@pytest.mark.parametrize(("layout", "family"), [("tsp4", "mixtral"), ("mix2_4", "gpt_oss")])
def test_a_mixture_starts_from_given_weights(layout, family, tmp_path):
    """Coefficients of the router's losses are no part of a folder."""
    model, placement = FAMILIES[family], place_case(layout)
    trained = dataclasses.replace(model, experts=dataclasses.replace(model.experts, balance_loss=0.01, z_loss=1e-3))
    config = run_config(save_folder(tmp_path / "model", model), trained)
    assert check_init_from(config, placement) == []
    state = init_state(config, make_program(config, placement), placement, frozen={})
    chex.assert_trees_all_equal(state.params, place_params(model, placement))


def test_given_weights_have_no_selection_bias(tmp_path):
    model = FAMILIES["mixtral"]
    config = run_config(
        save_folder(tmp_path / "model", model),
        dataclasses.replace(model, experts=dataclasses.replace(model.experts, bias_rate=0.001)),
    )
    with pytest.raises(ConfigError, match=r"bias_rate=0.001, .* has 0.0; use .* or --model.experts.bias-rate 0.0"):
        check_init_from(config, place_case("single"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"d_ff": 240, "num_layers": 4},
            "model.num_layers=4, .* has 2; use .* or --model.num-layers 2 --model.d-ff 120$",
        ),
        ({"num_layers": 4}, "model.num_layers=4, .* has 2; use .* or --model.num-layers 2"),
        ({"qk_norm": True}, "model.qk_norm=True, .* has False; use .* or --model.no-qk-norm"),
        (
            {"rope_scaling": RopeScaling(fraction=0.5)},
            "model.rope_scaling.fraction=0.5, .*; use .* or --model.rope-scaling.fraction 1.0",
        ),
    ],
)
def test_given_weights_of_another_model_are_refused(change, words, folder):
    with pytest.raises(ConfigError, match=words) as refused:
        check_init_from(run_config(folder, dataclasses.replace(LLAMA, **change)), place_case("single"))
    assert str(folder) in str(refused.value)


LONGER = RopeScaling(kind="yarn", factor=4.0, original_context=64)


def test_a_run_may_scale_the_rope_of_given_weights(folder):
    config = run_config(folder, dataclasses.replace(LLAMA, rope_scaling=LONGER))
    check_init_from(config, place_case("single"))


def test_a_run_may_not_leave_out_the_scaling_of_given_weights(tmp_path):
    folder = save_folder(tmp_path / "model", dataclasses.replace(LLAMA, rope_scaling=LONGER))
    words = (
        "model.rope_scaling.kind=none, .* has yarn; use .* or --model.rope-scaling.kind yarn --model.rope-scaling.fac"
    )
    with pytest.raises(ConfigError, match=words):
        check_init_from(run_config(folder, LLAMA), place_case("single"))


def test_fields_that_the_scaling_does_not_use_may_differ(folder):
    scaling = dataclasses.replace(LLAMA.rope_scaling, original_context=123)
    check_init_from(run_config(folder, dataclasses.replace(LLAMA, rope_scaling=scaling)), place_case("single"))


@pytest.mark.parametrize(
    ("vocab_size", "tokenizer", "npy", "named", "refused"),
    [
        (72, "", False, "bytes", ""),
        (512, "", False, "bytes", ""),
        (520, "", False, "bytes", "makes a token of each byte; .* a vocabulary of 520"),
        (520, "", True, "", ""),
        (72, "tokenizer.json", False, "bytes", "makes a token of each byte; .* has tokenizer.json"),
        (72, "tokenizer.model", False, "bytes", "makes a token of each byte; .* has tokenizer.model"),
        (72, "tokenizer.json", True, "", ""),
        (72, "tokenizer.json", False, "", ""),
        (72, "", False, "", "has no tokenizer.json, and data.files=.* is text"),
        (72, "tokenizer.model", False, "", "has no tokenizer.json, and data.files=.* is text"),
    ],
)
def test_text_has_the_tokens_of_the_model(vocab_size, tokenizer, npy, named, refused, tmp_path):
    model = dataclasses.replace(LLAMA, vocab_size=vocab_size, num_layers=1)
    folder = save_folder(tmp_path / "model", model)
    if tokenizer:
        (folder / tokenizer).write_text("{}")
    (tmp_path / "a.txt").write_text("text")
    np.save(tmp_path / "a.npy", np.arange(64))
    files = str(tmp_path / ("*.npy" if npy else "*.txt"))
    config = dataclasses.replace(
        run_config(folder, model), data=DataConfig(files=files, order="contiguous", tokenizer=named)
    )
    with pytest.raises(ConfigError, match=refused) if refused else nullcontext():
        check_init_from(config, place_case("single"))


def test_initial_spread_may_differ_and_a_run_to_resume_needs_no_folder(folder, tmp_path):
    check_init_from(run_config(folder, dataclasses.replace(LLAMA, init_std=0.5)), place_case("single"))
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    check_init_from(run_config("nowhere", workdir=str(tmp_path / "run")), place_case("single"))
