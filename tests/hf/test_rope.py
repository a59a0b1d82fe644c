"""RoPE in config.json: read, written, and its frequencies those of transformers."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tests.builders.folders import LLAMA
from tsp_jax.config import RopeScaling
from tsp_jax.errors import ConfigError
from tsp_jax.hf.config import config_json
from tsp_jax.hf.rope import CONTEXT, read_rope, read_two_ropes, rope_json
from tsp_jax.ops.rope import attention_factor, frequencies

H = LLAMA.head_dim
SHORT, LONG = [1.0, 1.25, 1.5, 2.0, 2.5, 3.0], [1.5, 2.0, 4.0, 6.0, 9.0, 14.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
LONGROPE_8 = RopeScaling(
    kind="longrope", factor=8.0, original_context=64, short_factors=tuple(SHORT), long_factors=tuple(LONG)
)
YARN = {"rope_type": "yarn", "factor": 4.0, CONTEXT: 64}
YARN_4 = RopeScaling(kind="yarn", factor=4.0, original_context=64)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, CONTEXT: 64}
SCALED = {
    "default": ({"rope_type": "default"}, RopeScaling(original_context=512)),
    "linear": ({"rope_type": "linear", "factor": 4.0}, RopeScaling(kind="linear", factor=4.0, original_context=512)),
    "llama3": (LLAMA3, RopeScaling(kind="llama3", factor=8.0, original_context=64)),
    "yarn": (YARN, YARN_4),
    "yarn of a context beside": (
        {"rope_type": "yarn", "factor": 4.0},
        RopeScaling(kind="yarn", factor=4.0, original_context=512),
    ),
    "yarn with bounds": (
        {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        dataclasses.replace(YARN_4, beta_fast=16.0, beta_slow=2.0, truncate=False),
    ),
    "yarn with bounds of null": ({**YARN, "beta_fast": None, "beta_slow": None}, YARN_4),
    "yarn with a factor of attention": (
        {**YARN, "attention_factor": 0.75, "mscale": 1.0, "mscale_all_dim": 0.5},
        dataclasses.replace(YARN_4, attention_factor=0.75),
    ),
    "yarn with mscale": (
        {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5},
        dataclasses.replace(YARN_4, attention_factor=(1 + 0.15 * math.log(4)) / (1 + 0.05 * math.log(4))),
    ),
    "yarn with mscale alone": ({**YARN, "mscale": 1.5}, YARN_4),
    "longrope": ({**LONGROPE, CONTEXT: 64}, LONGROPE_8),
    "longrope with a factor": (
        {**LONGROPE, CONTEXT: 64, "factor": 3.0, "attention_factor": 1.25},
        dataclasses.replace(LONGROPE_8, factor=3.0, attention_factor=1.25),
    ),
}
"""rope_scaling of a config.json with max_position_embeddings=512, what is read"""


def raw_config(scaling: dict, **others) -> dict:
    return {"max_position_embeddings": 512, "rope_theta": 5e5, "rope_scaling": scaling, **others}


@pytest.mark.parametrize("case", SCALED)
def test_scaling_is_read(case):
    scaling, desired = SCALED[case]
    assert read_rope("config.json", raw_config(scaling)) == (5e5, desired)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("case", SCALED)
def test_scaling_is_written_as_it_is_read(case, beside):
    model = dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=SCALED[case][1])
    written = rope_json(model, 512, context_beside=beside)
    assert read_rope("config.json", written) == (5e5, SCALED[case][1])


@pytest.mark.parametrize(
    ("scaling", "context", "longest"),
    [
        (RopeScaling(original_context=64), None, 64),
        (RopeScaling(original_context=64), 512, 512),
        (YARN_4, None, 256),
        (YARN_4, 64, 256),
        (YARN_4, 512, 512),
    ],
)
def test_a_scaling_lengthens_the_context(scaling, context, longest):
    model = dataclasses.replace(LLAMA, rope_scaling=scaling)
    assert rope_json(model, context)["max_position_embeddings"] == longest


def test_a_model_is_extended_by_a_kind_and_a_factor():
    """The context is the one that the folder says, max_position_embeddings."""
    _, plain = read_rope("config.json", raw_config({}))
    assert dataclasses.replace(plain, kind="yarn", factor=4.0).original_context == 512


def test_phi3_has_its_context_beside_its_scaling():
    model = dataclasses.replace(LLAMA, rope_scaling=LONGROPE_8)
    written = rope_json(model, context_beside=True)
    assert written["rope_scaling"] == {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    assert (written[CONTEXT], written["max_position_embeddings"]) == (64, 512)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_names_of_longrope_in_phi3(kind):
    raw = raw_config({"type": kind, "short_factor": SHORT, "long_factor": LONG}, **{CONTEXT: 64})
    assert read_rope("config.json", raw, aliases={"su": "longrope", "yarn": "longrope"}) == (5e5, LONGROPE_8)


def test_part_of_a_head():
    raw = raw_config({}, partial_rotary_factor=0.75)
    assert read_rope("config.json", raw, partial=True)[1].fraction == 0.75
    with pytest.raises(ConfigError, match=r"partial_rotary_factor=0\.75 is not supported; use .* whole heads"):
        read_rope("config.json", raw)


@pytest.mark.parametrize("missing", ["short_factor", "long_factor"])
def test_factors_that_are_missing_are_refused(missing):
    with pytest.raises(ConfigError, match=f"{missing} is missing for rope_type=longrope"):
        read_rope("config.json", raw_config({**LONGROPE, CONTEXT: 64, missing: None}))


TWO = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 512}
LINEAR_8 = RopeScaling(kind="linear", factor=8.0, original_context=512)
PLAIN = RopeScaling(original_context=512)


@pytest.mark.parametrize(
    ("changes", "desired"),
    [
        ({}, (1e6, PLAIN, 1e4)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, (1e6, LINEAR_8, 1e4)),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": None}},
            (1e6, LINEAR_8, 1e4),
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}},
            (5e5, PLAIN, 2e4),
        ),
    ],
)
def test_two_ropes_are_read(changes, desired):
    assert read_two_ropes("config.json", TWO | changes) == desired


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rope_type": "linear", "factor": 8.0}, "use objects full_attention and sliding_attention"),
        ({"sliding_attention": LLAMA3}, "rope_type=llama3 of sliding_attention is not supported; use default"),
        ({"full_attention": {"rope_type": "dynamic"}}, 'rope_type="dynamic" is not supported'),
    ],
)
def test_other_ropes_of_two_kinds_of_layers_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        read_two_ropes("config.json", TWO | {"rope_parameters": given})


@pytest.mark.index
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("length", [64, 65])
@pytest.mark.parametrize("case", [case for case in SCALED if case != "default"])
def test_frequencies_are_those_of_transformers(case, length, tmp_path):
    """Of a config.json, and of the one that is written after it is read."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, desired = SCALED[case]
    model = dataclasses.replace(LLAMA, d_model=32, rope_theta=5e5, rope_scaling=desired)
    given = config_json(model, "float32") | {"rope_scaling": scaling, "max_position_embeddings": 512}
    for number, content in enumerate((given, config_json(model, "float32", {"max_position_embeddings": 512}))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
        theirs = transformers.AutoConfig.from_pretrained(folder)
        inverse, factor = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, "cpu", seq_len=length)
        assert attention_factor(desired) == pytest.approx(factor, rel=1e-12)
        np.testing.assert_allclose(frequencies(H, 5e5, desired.at(length)), inverse.numpy(), rtol=1e-5)
