"""Every family against the transformers library, on random small models: logits, prefill and decode, exports."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.builders.arrays import place_case, relative_error
from tests.builders.transformers_models import LOGITS_TOLERANCE, SEQ_LEN, SIZES, Ours, random_model, their_logits
from tsp_jax.config import StreamConfig
from tsp_jax.hf import weights as hf
from tsp_jax.inference import make_inference_program
from tsp_jax.inference.token_loop import prefill_prompts

pytestmark = [pytest.mark.index, pytest.mark.filterwarnings("default")]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.25, 1.5, 2.0, 3.0], "long_factor": [1.5, 2.0, 4.0, 7.0, 11.0]
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
MODELS = {
    "llama_grouped": ("Llama", {}),
    "llama_tied_llama3": (
        "Llama",
        {"tie_word_embeddings": True, "rope_scaling": LLAMA3, "head_dim": 16, "rope_theta": 5e5},
    ),
    "llama_padded_linear": (
        "Llama",
        {
            "hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 12,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "mistral_any_width": ("Mistral", {"sliding_window": None, "hidden_size": 52, "head_dim": 10}),
    "mistral_window": ("Mistral", {"sliding_window": 9, "head_dim": 10}),
    "qwen2_grouped": ("Qwen2", {}),
    "qwen2_padded_yarn": (
        "Qwen2",
        {"hidden_size": 90, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_scaling": YARN},
    ),
    "qwen2_windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3_window": (
        "Qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen3_grouped": ("Qwen3", {"head_dim": 20}),
    "qwen3_tied_multi_head": ("Qwen3", {"head_dim": 12, "num_key_value_heads": 8, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 10, "query_pre_attn_scalar": 24, "sliding_window": 9, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0, "num_hidden_layers": 4,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 10, "query_pre_attn_scalar": 24, "sliding_window": 9, "sliding_window_pattern": 3,
            "num_hidden_layers": 7, "final_logit_softcapping": 3.0, "rope_theta": 5e4, "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "phi3_window": ("Phi3", {"sliding_window": 9, "hidden_size": 80, "pad_token_id": 0}),
    "phi3_partial": ("Phi3", {"partial_rotary_factor": 0.75, "hidden_size": 64, "pad_token_id": 0}),
    "phi3_long": (
        "Phi3",
        {
            "rope_scaling": LONGROPE, "hidden_size": 80, "original_max_position_embeddings": 32, "pad_token_id": 0,
        },
    ),
    "phi3_short": (
        "Phi3",
        {
            "rope_scaling": LONGROPE, "hidden_size": 80, "original_max_position_embeddings": 128, "pad_token_id": 0,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "pad_token_id": 0}),
    "smollm3_windows": (
        "SmolLM3",
        {
            "no_rope_layers": [1, 0, 1, 0], "layer_types": [SLIDING, FULL] * 2, "sliding_window": 7,
            "use_sliding_window": True, "num_hidden_layers": 4, "pad_token_id": 0,
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
            "logits_scaling": 4.0,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "intermediate_size": 20, "sliding_window": None}),
    "mixtral_window": (
        "Mixtral",
        {"num_local_experts": 8, "intermediate_size": 20, "sliding_window": 9, "num_experts_per_tok": 1},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 12, "num_experts": 10, "moe_intermediate_size": 20, "norm_topk_prob": True},
    ),
    "qwen3_moe_plain_sums": (
        "Qwen3Moe",
        {
            "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "tie_word_embeddings": True,
            "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12,
        },
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 20, "pad_token_id": 0, "eos_token_id": 1},
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 6, "intermediate_size": 20, "embedding_multiplier": 6.0, "residual_multiplier": 0.4,
            "attention_multiplier": 0.3, "logits_scaling": 4.0,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 12, "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 20,
            "sliding_window": 9, "num_hidden_layers": 4, "rope_scaling": {**YARN, "truncate": False},
        },
    ),
    "gpt_oss_full": (
        "GptOss",
        {
            "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12, "num_local_experts": 5,
            "num_experts_per_tok": 1, "intermediate_size": 52, "layer_types": [FULL] * 3, "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "default"},
        },
    ),
    "olmo2_grouped": ("Olmo2", {}),
    "olmo2_padded": ("Olmo2", {"hidden_size": 90, "num_attention_heads": 9, "num_key_value_heads": 3}),
}  # fmt: skip
"""name -> (family, changes of SIZES)"""
FIRST = {family: name for name, (family, _) in reversed(MODELS.items())}
CASES = [*((name, "tsp4") for name in MODELS), *((name, "single") for name in FIRST.values())]
"""every model under tsp, one of each family on one device"""


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs(request, transformers, tmp_path_factory):
    """(model of theirs, its folder of several files)."""
    model, folder = random_model(transformers, *MODELS[request.param]), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model, folder


def make_tokens(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (batch, SEQ_LEN))


@pytest.mark.parametrize(("theirs", "layout"), CASES, indirect=["theirs"])
def test_logits_are_those_of_transformers(theirs, layout, record_property):
    model, folder = theirs
    error = relative_error(Ours(folder, place_case(layout)).logits(make_tokens(2)), their_logits(model, make_tokens(2)))
    record_property("relative_error", error)
    print(f"{folder.name}: relative error of the logits {error:.2e}")
    assert error <= LOGITS_TOLERANCE


@pytest.mark.parametrize(("theirs", "layout"), CASES, indirect=["theirs"])
def test_prefill_and_decode_have_the_logits_of_transformers(theirs, layout):
    model, folder = theirs
    tokens, first = make_tokens(1)[0], 85
    config, placement = hf.read_config(folder), place_case(layout)
    program = make_inference_program(
        config, placement, stream=StreamConfig(bucket_mib=0.01), dtype="float32", batch=1, capacity=SEQ_LEN, chunk=48
    )
    params, desired = hf.load_params(folder, config, placement), their_logits(model, tokens[None])[0]
    logits, cache = prefill_prompts(program, params, program.init_cache(), [tokens[:first].tolist()])
    found = [logits[0]]
    for place in range(first, SEQ_LEN - 1):
        token = jax.device_put(tokens[place : place + 1].astype(np.int32), program.abstract_tokens.sharding)
        logits, cache = program.decode(params, cache, token)
        found.append(logits[0])
    assert relative_error(np.stack(found), desired[first - 1 : -1]) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("theirs", MODELS, indirect=True)
def test_an_export_is_theirs_bitwise_and_transformers_reads_it(theirs, transformers, tmp_path):
    model, folder = theirs
    config, placement = hf.read_config(folder), place_case("tsp4")
    params = hf.load_params(folder, config, placement)
    hf.save_params(tmp_path / "ours", params, config, placement, source=folder, max_file_bytes=100_000)
    before, after = (
        {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}
        for path in (folder, tmp_path / "ours")
    )
    assert before.keys() == after.keys()
    assert [name for name, array in before.items() if not np.array_equal(array, after[name])] == []
    assert hf.read_config(tmp_path / "ours") == config
    hf.save_params(tmp_path / "without_source", params, config, placement)
    for path in (tmp_path / "ours", tmp_path / "without_source"):
        again = transformers.AutoModelForCausalLM.from_pretrained(path)
        assert relative_error(their_logits(again, make_tokens(2)), their_logits(model, make_tokens(2))) <= 1e-6
