"""Prefill and decode under every layout, against the plain mathematics on the whole sequence."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tsp_jax
from tests.builders.arrays import BF16_TOLERANCE, LAYOUT_CASES, UNUSUAL_CASES, place_case, relative_error
from tsp_jax.config import Config, DType, ModelConfig, StreamConfig
from tsp_jax.cost.serving import cache_bytes, decode_traffic
from tsp_jax.errors import ConfigError
from tsp_jax.heads import to_stored
from tsp_jax.inference import Sampling, Stats, generate_tokens, make_inference_program, sample
from tsp_jax.inference.cache import ENTRIES_MULTIPLE, assign_tokens
from tsp_jax.inference.sampling import filter_top_k, filter_top_p, row_keys
from tsp_jax.inference.token_loop import prefill_prompts
from tsp_jax.inspect import compiled_memory, list_buffers, list_collectives, parse
from tsp_jax.ops import kernels, reference
from tsp_jax.ops.attention.kv_cache import EMPTY, NO_TOKEN
from tsp_jax.ops.norm import rms_norm
from tsp_jax.training.data import sequence_order

LOGITS_TOLERANCE = 1e-4
"""relative; float32 sums in another order, through two layers: 1e-6 is typical"""

MULTI_HEAD = ModelConfig(
    vocab_size=72, d_model=28, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=10, d_ff=120, init_std=0.2
)
MODELS = {
    "multi_head": MULTI_HEAD,
    "grouped": dataclasses.replace(MULTI_HEAD, num_kv_heads=2, qk_norm=True),
    "odd_heads": dataclasses.replace(MULTI_HEAD, num_heads=9, num_kv_heads=3, tie_embeddings=True, activation="gelu"),
    "thirds": dataclasses.replace(MULTI_HEAD, num_kv_heads=2, head_dim=12),  # three ranks could share a KV head
}
STREAM = StreamConfig(bucket_mib=0.004)
BATCH, CAPACITY, CHUNK, STEPS = 4, 128, 48, 67
LENGTHS = (1, 61, 13, 48)
"""of prompts: one token; more than a chunk, and with all steps every slot; neither even nor a multiple of any ranks; a
whole chunk"""

CASES = [
    ("single", "odd_heads"), ("tsp2", "odd_heads"), ("tsp3", "grouped"), ("tsp4", "odd_heads"), ("tsp8", "multi_head"),
    ("tsp8", "grouped"), ("tsp8", "odd_heads"), ("tp8", "grouped"), ("tp2_sp4", "odd_heads"), ("tp4_sp2", "grouped"),
    ("sp8", "multi_head"), ("fsdp_cp8", "odd_heads"), ("data2_tsp4", "grouped"), ("mix2_4", "odd_heads"),
    ("two_axes2_4", "multi_head"), ("partial2_4", "grouped"),
    ("mix2_3", "odd_heads"), ("mix3_2", "thirds"),
]  # fmt: skip
"""every layout, every model under tsp, and fewer KV heads than ranks wherever that is a case of its own"""
OTHER_CASES = [
    (case, model) for case in (*LAYOUT_CASES, *UNUSUAL_CASES) for model in MODELS if (case, model) not in CASES
]


def config_of(model: str, **changes) -> Config:
    """For closed forms, which take a training configuration."""
    fields = {"model": MODELS[model], "stream": STREAM, "steps": 1, "batch": 1, "seq_len": 8}
    return Config(**({**fields, "compute_dtype": "float32"} | changes))


@functools.cache
def program_of(case: str, model: str, chunk: int = CHUNK, dtype: DType = "float32"):
    return make_inference_program(
        MODELS[model], place_case(case), stream=STREAM, dtype=dtype, batch=BATCH, capacity=CAPACITY, chunk=chunk
    )


@functools.cache
def served(case: str, model: str, chunk: int = CHUNK, dtype: DType = "float32"):
    """(program, params) of a model with the same logical parameters whatever the case."""
    program = program_of(case, model, chunk, dtype)
    shardings = jax.tree.map(lambda array: array.sharding, program.abstract_params)
    return program, program.cast_params(jax.device_put(to_stored(program.paddings, logical_params(model)), shardings))


@functools.cache
def logical_params(model: str):
    """Norm scales are random too, so that none can stand in for another."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        value = rng.normal(size=leaf.shape)
        return (1 + 0.3 * value if "norm" in str(path) else 0.2 * value).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, program_of("single", model).abstract_params)


@functools.cache
def reference_forward(model: str):
    """Jitted (logical params, tokens [B, T]) -> logits [B, T, V]."""
    config = MODELS[model]

    def forward(params, tokens_BT):
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        x_BTD = reference.embed(tokens_BT, params["embed"]["table"])
        for index in range(config.num_layers):
            layer = jax.tree.map(lambda p, i=index: p[i], params["layers"])
            attn, ffn = layer["attention"], layer["mlp"]
            h_BTD = rms_norm(x_BTD, layer["attention_norm"]["scale"], config.norm_eps)
            x_BTD += reference.attention(
                h_BTD, attn["w_q"], attn["w_k"], attn["w_v"], attn["w_o"], positions, jnp.zeros_like(positions),
                head_dim=config.head_dim, theta=config.rope_theta, eps=config.norm_eps,
                norms=(attn["q_norm"], attn["k_norm"]) if config.qk_norm else None,
            )  # fmt: skip
            h_BTD = rms_norm(x_BTD, layer["mlp_norm"]["scale"], config.norm_eps)
            x_BTD += reference.mlp(h_BTD, ffn["w_gate"], ffn["w_up"], ffn["w_down"], config.activation)
        x_BTD = rms_norm(x_BTD, params["final_norm"]["scale"], config.norm_eps)
        return x_BTD @ params["embed" if config.tie_embeddings else "head"]["table"].T

    return jax.jit(forward)


def reference_logits(model: str, sequences) -> np.ndarray:
    """[B, T, V] of sequences of any lengths up to the capacity."""
    padded = np.zeros((BATCH, CAPACITY), np.int32)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return np.asarray(reference_forward(model)(logical_params(model), padded))


def make_prompts(lengths=LENGTHS) -> list[list[int]]:
    return [np.random.default_rng([row, n]).integers(0, 72, n).tolist() for row, n in enumerate(lengths)]


def greedy(program, params, logits, cache, steps: int):
    """(new tokens [B, steps], logits [B, steps, V] that each was taken from, cache with all of them)."""
    tokens, seen = [], []
    for _ in range(steps):
        seen.append(np.asarray(logits))
        tokens.append(seen[-1].argmax(axis=-1).astype(np.int32))
        logits, cache = program.decode(params, cache, jax.device_put(tokens[-1], program.abstract_tokens.sharding))
    return np.stack(tokens, axis=1), np.stack(seen, axis=1), cache


@functools.cache
def continued(case: str, model: str, steps: int = STEPS):
    """(prompts, new tokens, their logits, cache)."""
    program, params = served(case, model)
    prompts = make_prompts()
    logits, cache = prefill_prompts(program, params, program.init_cache(), prompts)
    return prompts, *greedy(program, params, logits, cache, steps)


def check(case: str, model: str) -> None:
    """Logits at every step, and so the likeliest tokens, are those of the whole forward."""
    prompts, tokens, logits, _ = continued(case, model)
    desired = reference_logits(model, [[*prompt, *row] for prompt, row in zip(prompts, tokens, strict=True)])
    for row, prompt in enumerate(prompts):
        expected = desired[row, len(prompt) - 1 : len(prompt) - 1 + STEPS]
        errors = [relative_error(logits[row, step], expected[step]) for step in range(STEPS)]
        assert max(errors) <= LOGITS_TOLERANCE, f"prompt of {len(prompt)} tokens: {errors}"
        assert tokens[row].tolist() == expected.argmax(axis=-1).tolist()


@pytest.mark.parametrize(("case", "model"), CASES)
def test_every_step_equals_the_whole_forward(case, model):
    check(case, model)


@pytest.mark.soak
@pytest.mark.parametrize(("case", "model"), OTHER_CASES)
def test_every_other_layout_and_model(case, model):
    check(case, model)


def test_one_device_is_one_device():
    """tsp 1 has nothing to fold, and is the program of `single` above."""
    alone = tsp_jax.place("tsp", tsp=1)
    assert dataclasses.replace(alone.layout, name="single") == place_case("single").layout


def test_every_layout_is_in_the_short_run():
    assert {case for case, _ in CASES} == {*LAYOUT_CASES, *UNUSUAL_CASES}


# ------------------------------------------------------------------------------------------------ chunks and turns


def test_chunks_fill_the_cache_as_the_whole_prompt_does():
    prompts = make_prompts()
    (program, params), (whole, _) = served("tsp4", "odd_heads"), served("tsp4", "odd_heads", chunk=64)
    logits, cache = prefill_prompts(program, params, program.init_cache(), prompts)
    whole_logits, whole_cache = prefill_prompts(whole, params, whole.init_cache(), prompts)
    assert relative_error(logits, whole_logits) <= LOGITS_TOLERANCE
    for row, prompt in enumerate(prompts):
        (here, there) = (np.asarray(c.positions_BS)[row] for c in (cache, whole_cache))
        assert sorted(here)[: len(prompt)] == sorted(there)[: len(prompt)] == list(range(len(prompt)))
        slots, whole_slots = np.argsort(here)[: len(prompt)], np.argsort(there)[: len(prompt)]
        for array, whole_array in ((cache.k_LBKSH, whole_cache.k_LBKSH), (cache.v_LBKSH, whole_cache.v_LBKSH)):
            error = relative_error(np.asarray(array)[:, row, :, slots], np.asarray(whole_array)[:, row, :, whole_slots])
            assert error <= LOGITS_TOLERANCE


def test_prefill_attends_by_the_kernel_that_is_chosen(monkeypatch):
    """The fused one, interpreted, which needs one device; a sequence without a token in the second chunk, too."""
    monkeypatch.setattr(kernels, "choose", lambda *_: "interpret")
    monkeypatch.setattr(kernels.blockwise, "attend", None)
    program = make_inference_program(
        MODELS["odd_heads"], place_case("single"),
        stream=STREAM, dtype="float32", batch=BATCH, capacity=CAPACITY, chunk=CHUNK,
    )  # fmt: skip
    prompts, params = make_prompts(), jax.tree.map(jnp.asarray, logical_params("odd_heads"))
    logits, _ = prefill_prompts(program, params, program.init_cache(), prompts)
    desired = reference_logits("odd_heads", prompts)
    for row, prompt in enumerate(prompts):
        assert relative_error(logits[row], desired[row, len(prompt) - 1]) <= LOGITS_TOLERANCE


@pytest.mark.parametrize(("case", "model"), [("tsp4", "odd_heads"), ("tp4_sp2", "grouped")])
def test_a_second_turn_of_the_conversation_continues_the_cache(case, model):
    """Prefill, decode, prefill more: chunks start anywhere and end near the last slot, and one row gets nothing."""
    program, params = served(case, model)
    first, second = make_prompts((5, 50, 1, 33)), make_prompts((7, 55, 0, 2))
    logits, cache = prefill_prompts(program, params, program.init_cache(), first)
    tokens, _, cache = greedy(program, params, logits, cache, 6)
    logits, cache = prefill_prompts(program, params, cache, second)
    sequences = [[*a, *b, *c] for a, b, c in zip(first, tokens, second, strict=True)]
    desired = reference_logits(model, sequences)
    for row, sequence in enumerate(sequences):
        if second[row]:
            assert relative_error(logits[row], desired[row, len(sequence) - 1]) <= LOGITS_TOLERANCE
    more, seen, _ = greedy(program, params, logits.at[2].set(desired[2, len(sequences[2]) - 1]), cache, 3)
    desired = reference_logits(model, [[*a, *b] for a, b in zip(sequences, more, strict=True)])
    for row, sequence in enumerate(sequences):
        last = len(sequence) - 1
        assert relative_error(seen[row], desired[row, last : last + 3]) <= LOGITS_TOLERANCE


def test_sequences_that_have_ended_stay_as_they_are():
    program, params = served("tsp4", "odd_heads")
    logits, cache = prefill_prompts(program, params, program.init_cache(), make_prompts())
    before = np.asarray(cache.lengths_B), np.asarray(cache.positions_BS)
    tokens = np.array([3, -1, 4, -1], np.int32)
    logits, cache = program.decode(params, cache, jax.device_put(tokens, program.abstract_tokens.sharding))
    assert np.asarray(cache.lengths_B).tolist() == (before[0] + [1, 0, 1, 0]).tolist()
    changed = (np.asarray(cache.positions_BS) != before[1]).sum(axis=1)
    assert changed.tolist() == [1, 0, 1, 0]
    assert np.isfinite(logits).all()


@jax.numpy_dtype_promotion("standard")  # flax's RMSNorm promotes
def test_bfloat16_parameters_and_cache():
    program, params = served("tsp4", "odd_heads", dtype="bfloat16")
    assert {array.dtype for array in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert program.abstract_cache.k_LBKSH.dtype == jnp.dtype("bfloat16")
    prompts = make_prompts()
    logits, cache = prefill_prompts(program, params, program.init_cache(), prompts)
    tokens, logits, _ = greedy(program, params, logits, cache, 4)
    desired = reference_logits("odd_heads", [[*prompt, *row] for prompt, row in zip(prompts, tokens, strict=True)])
    for row, prompt in enumerate(prompts):
        assert relative_error(logits[row], desired[row, len(prompt) - 1 :][:4]) <= BF16_TOLERANCE


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("case", [case for case, _ in CASES])
def test_a_device_holds_its_share_of_the_cache_and_at_most_a_page_more(case):
    placement = place_case(case)
    program, ranks = program_of(case, "multi_head"), placement.size("sequence")
    sizes = dict.fromkeys(placement.layout.axis_names, 1) | dict(placement.mesh.shape)
    config = dataclasses.replace(config_of("multi_head"), batch=BATCH, seq_len=CAPACITY)
    share = cache_bytes(config, placement.layout, sizes)
    arrays = program.abstract_cache.key_values
    mine = sum(4 * math.prod(array.sharding.shard_shape(array.shape)) for array in arrays)
    assert share <= mine <= share * (1 + ENTRIES_MULTIPLE * ranks / CAPACITY)
    model = MODELS["multi_head"]
    total = 2 * model.num_layers * BATCH * CAPACITY * model.num_kv_heads * model.head_dim * 4
    shards = math.prod(placement.mesh.shape[axis] for axis in placement.layout.axes("heads").tensor)
    shards *= ranks * placement.size("batch")
    padding = {"tsp3": 9 / 8, "mix2_3": 12 / 8, "mix3_2": 12 / 8}.get(case, 1)  # ranks do not divide the heads
    assert share == pytest.approx(padding * total / shards)


@pytest.mark.parametrize(("case", "model"), CASES)
def test_ranks_keep_equally_many_tokens_of_every_sequence(case, model):
    prompts, _, _, cache = continued(case, model)
    ranks = place_case(case).size("sequence")
    used = (np.asarray(cache.positions_BS).reshape(BATCH, ranks, -1) != EMPTY).sum(axis=-1)
    assert np.asarray(cache.lengths_B).tolist() == [len(prompt) + STEPS for prompt in prompts] == used.sum(1).tolist()
    assert (used.max(axis=1) - used.min(axis=1) <= 1).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_deal_gives_every_token_once_and_keeps_ranks_level(ranks):
    rng = np.random.default_rng(ranks)
    chunk = 4 * ranks
    starts, counts = rng.integers(0, 50, 20), rng.integers(0, chunk + 1, 20)
    for row, start, count in zip(assign_tokens(starts, counts, chunk, ranks), starts, counts, strict=True):
        real = row.reshape(ranks, -1) != NO_TOKEN
        assert sorted(row[row != NO_TOKEN]) == list(range(start, start + count))
        kept = [len(range(rank, start, ranks)) for rank in range(ranks)] + real.sum(axis=1)
        assert kept.max() - kept.min() <= 1
        assert (np.diff(real.astype(int), axis=1) <= 0).all(), "a rank's tokens stand first"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_deal_of_a_whole_chunk_is_the_order_of_training(ranks):
    assert assign_tokens([0], [48], 48, ranks)[0].tolist() == sequence_order(48, ranks, "zigzag").tolist()


# ------------------------------------------------------------------------------------------------ compiled programs

WIDE = ModelConfig(
    vocab_size=160, d_model=56, num_layers=3, num_heads=16, num_kv_heads=16, head_dim=8, d_ff=208, init_std=0.2
)
MODELS["wide"] = WIDE
"""a model whose every weight has more elements than anything that decoding may move"""


@functools.cache
def compiled(case: str, step: str, model: str = "wide"):
    program = program_of(case, model)
    args = (program.abstract_tokens,) if step == "decode" else program.abstract_chunk
    return getattr(program, step).lower(program.abstract_params, program.abstract_cache, *args).compile()


DECODED = [("single", "wide"), ("tsp3", "odd_heads"), ("tsp8", "grouped"), ("tp8", "grouped"), ("sp8", "wide"),
    ("tp2_sp4", "wide"), ("tp4_sp2", "grouped"), ("data2_tsp4", "odd_heads"), ("mix2_4", "wide"), ("mix3_2", "thirds"),
    ("two_axes2_4", "multi_head"), ("partial2_4", "grouped")]  # fmt: skip


@pytest.mark.parametrize(("case", "model"), DECODED)
def test_decode_moves_what_its_closed_form_says(case, model):
    """To the byte, by op; the form knows neither weights nor the length of the cache."""
    placement = place_case(case)
    sizes = dict.fromkeys(placement.layout.axis_names, 1) | dict(placement.mesh.shape)
    moved = list_collectives(parse(compiled(case, "decode", model).as_text()), dict(placement.mesh.shape))
    found = dict.fromkeys(("attention", "mlp", "embed", "logits"), 0.0)
    for c in moved:
        found[next((op for op in found if f"tsp/{op}" in c.scope), "logits")] += c.total_bytes
    config = dataclasses.replace(config_of(model), batch=BATCH)
    desired = {op: sum(kinds.values()) for op, kinds in decode_traffic(config, placement.layout, sizes).items()}
    assert found == pytest.approx(desired, abs=len(moved) * WIDE.num_layers)  # each message is counted in whole bytes


@pytest.mark.parametrize("case", ["tsp8", "tp8", "sp8"])
def test_what_decode_moves_is_linear_in_activations(case):
    """O(B (D + N H)) a layer and O(B V): nothing with the hidden width, the context, or two of them multiplied."""
    placement, sizes = place_case(case), dict(place_case(case).mesh.shape)

    def moved(**changes) -> float:
        batch = changes.pop("batch", BATCH)
        model = dataclasses.replace(WIDE, **{**changes, "num_layers": changes.get("num_layers", 1)})
        config = Config(model=model, steps=1, batch=batch, seq_len=changes.get("seq_len", 8))
        kinds = decode_traffic(config, placement.layout, sizes).values()
        return sum(sum(kind.values()) for kind in kinds)

    base = moved()
    assert moved(batch=2 * BATCH) == 2 * base
    assert moved(d_ff=2 * WIDE.d_ff) == base
    width, heads, vocab = (moved(**{k: 2 * getattr(WIDE, k)}) - base for k in ("d_model", "num_heads", "vocab_size"))
    assert moved(d_model=2 * WIDE.d_model, vocab_size=2 * WIDE.vocab_size) - base == pytest.approx(width + vocab)
    assert vocab <= BATCH * WIDE.vocab_size * 4
    assert width <= BATCH * WIDE.d_model * (2 * 4 + 4 * 2)
    assert heads >= 0


@pytest.mark.parametrize("case", ["tsp4", "tp8", "tp2_sp4", "mix2_4"])
def test_decode_moves_activations_alone(case):
    """The least weight shard has 16 * 8 / 8 * 56 elements; activations of a layer, about B (2 D + 4 N H)."""
    module = parse(compiled(case, "decode").as_text())
    moved = list_collectives(module, dict(place_case(case).mesh.shape))
    heads = WIDE.num_heads * WIDE.head_dim
    assert max(c.elements for c in moved) <= BATCH * max(2 * WIDE.d_model, WIDE.vocab_size, 3 * heads)
    layers = [c for c in moved if "attention" in c.scope or "mlp" in c.scope]
    ranks = place_case(case).size("sequence")
    budget = WIDE.num_layers * BATCH * (4 * WIDE.d_model + 5 * heads + ranks * WIDE.num_heads)
    assert sum(c.count * c.elements for c in layers) <= budget
    assert len(moved) <= 7 + 2 * (len(place_case(case).layout.sequence) > 0), "a handful of messages a layer"


def test_prefill_does_move_weights():
    """The contract above can fail."""
    module = parse(compiled("tsp4", "prefill").as_text())
    assert any("all-gather" in c.op and "mlp" in c.scope for c in list_collectives(module, {"data": 1, "tsp": 4}))


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_the_cache_is_written_where_it_lies(step):
    """Its memory is the result's, and no temporary is as large as all layers of it."""
    memory = compiled_memory(compiled("tsp4", step))
    cache = program_of("tsp4", "wide").abstract_cache.key_values
    total = sum(4 * math.prod(array.sharding.shard_shape(array.shape)) for array in cache)
    assert memory.alias_bytes >= total
    if step == "decode":
        assert memory.temp_bytes < total / 2 + 3 * total / WIDE.num_layers / 2


def test_a_cache_that_was_given_away_is_gone():
    program, params = served("tsp4", "odd_heads")
    given = program.init_cache()
    logits, cache = prefill_prompts(program, params, given, make_prompts())
    assert all(array.is_deleted() for array in given.key_values)
    tokens = np.asarray(logits).argmax(axis=-1).astype(np.int32)
    program.decode(params, cache, jax.device_put(tokens, program.abstract_tokens.sharding))
    assert all(array.is_deleted() for array in cache.key_values)


def test_decode_makes_no_copy_of_the_weights():
    module = parse(compiled("tsp4", "decode").as_text())
    shard = WIDE.d_ff // 4 * WIDE.d_model
    found = [b for b in list_buffers(module) if b.opcode != "parameter" and "mlp" in b.scope and b.bytes > 4 * shard]
    assert found == []


def test_prefill_gathers_a_bucket_of_heads_at_a_time():
    """Keys and values of a quarter of the heads, a message each, and never of the whole capacity."""
    module = parse(compiled("tsp4", "prefill").as_text())
    gathers = [c for c in list_collectives(module, {"data": 1, "tsp": 4}) if "gather_sequence" in c.scope]
    assert [c.elements for c in gathers] == 2 * [BATCH * CHUNK * WIDE.num_heads // 4 * WIDE.head_dim * 3 // 4]


def test_nothing_is_compiled_again_for_other_tokens_and_lengths():
    program, params = served("tsp4", "odd_heads")
    for lengths in ((4, 1, 9, 2), (48, 49, 3)):
        generate_tokens(program, params, make_prompts(lengths), max_new_tokens=9)
    assert program.prefill._cache_size() == 1
    assert program.decode._cache_size() == 1


# ------------------------------------------------------------------------------------------------ generate


def test_generate_continues_prompts_by_their_likeliest_tokens():
    program, params = served("tsp4", "odd_heads")
    _, tokens, _, _ = continued("tsp4", "odd_heads")
    calls = []
    prompts = [*make_prompts(), make_prompts()[1]]  # one more than the batch
    new = generate_tokens(program, params, prompts, max_new_tokens=20, on_token=lambda *call: calls.append(call))
    assert new == [*tokens[:, :20].tolist(), tokens[1, :20].tolist()]
    assert [[token for row, token in calls if row == n] for n in range(5)] == new
    assert [row for row, _ in calls[:8]] == [0, 1, 2, 3, 0, 1, 2, 3], "as they come"


def test_generate_counts_what_it_did():
    program, params = served("tsp4", "odd_heads")
    prompts = [*make_prompts(), make_prompts()[1]]
    full = generate_tokens(program, params, prompts, max_new_tokens=20, stats=(stats := Stats()))
    assert (stats.prompt_tokens, stats.new_tokens, stats.decoded_tokens) == (sum(map(len, prompts)), 100, 95)
    assert stats.prefill_s > 0 < stats.decode_s
    stopped = generate_tokens(program, params, prompts, max_new_tokens=20, stop_tokens=full[0][3:4], stats=stats)
    assert stats.new_tokens == 100 + sum(map(len, stopped)) < 200


def test_generate_ends_a_sequence_at_its_stop_token():
    program, params = served("tsp4", "odd_heads")
    full = generate_tokens(program, params, make_prompts(), max_new_tokens=20)
    stops = [full[0][3], full[1][7]]
    stopped = generate_tokens(program, params, make_prompts(), max_new_tokens=20, stop_tokens=stops)
    for row, tokens in enumerate(full):
        ends = [place for place, token in enumerate(tokens) if token in stops]
        assert stopped[row] == tokens[: ends[0] + 1 if ends else None]
    assert any(len(tokens) < 20 for tokens in stopped)


def test_a_draw_depends_on_seed_prompt_and_place_alone():
    program, params = served("tsp4", "odd_heads")
    prompts, hot = make_prompts(), Sampling(temperature=2.0, seed=3)
    drawn = generate_tokens(program, params, prompts, max_new_tokens=8, sampling=hot)
    assert generate_tokens(program, params, prompts[:2], max_new_tokens=8, sampling=hot) == drawn[:2]
    assert (
        generate_tokens(program, params, prompts, max_new_tokens=8, sampling=dataclasses.replace(hot, seed=4)) != drawn
    )
    assert generate_tokens(program, params, prompts, max_new_tokens=8) != drawn


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([[1], []], 4, r"prompts\[1\] is empty"),
        ([[1] * 100], 29, "capacity=128 is too small for the 100 tokens of .*; use capacity=129"),
        ([[1]], 0, "max_new_tokens=0 must be positive"),
        ([], 4, "is empty; use at least one prompt"),
        ([[1], [71, 72]], 4, r"prompts\[1\] has token id 72, which is unknown; use 0 to 71"),
        ([[-1]], 4, "has token id -1, which is unknown"),
    ],
)
def test_generate_refuses_what_cannot_be(prompts, max_new_tokens, message):
    program, params = served("tsp4", "odd_heads")
    with pytest.raises(ConfigError, match=message):
        generate_tokens(program, params, prompts, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 42}, "chunk=42 is not divisible by 4 over tsp; use 44"),
        ({"batch": 3}, "batch=3 is not divisible by 2 over data; use 4"),
        ({"capacity": 0}, "capacity=0 must be positive"),
        ({"dtype": "float16"}, "dtype=float16 is unknown; use one of float32, bfloat16"),
    ],
)
def test_program_refuses_what_the_mesh_cannot_cut(changes, message):
    sizes = {"batch": 4, "capacity": 64, "chunk": 16} | changes
    with pytest.raises(ConfigError, match=message):
        make_inference_program(MODELS["grouped"], place_case("data2_tsp4"), stream=STREAM, **sizes)


# ------------------------------------------------------------------------------------------------ sampling

LOGITS = np.log(np.array([[0.1, 0.4, 0.05, 0.25, 0.2], [0.6, 0.1, 0.1, 0.15, 0.05]], np.float32))


def kept(logits) -> list[list[int]]:
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits)]


def test_top_k_keeps_the_likeliest():
    assert kept(filter_top_k(jnp.asarray(LOGITS), 2)) == [[1, 3], [0, 3]]
    assert kept(filter_top_k(jnp.asarray(LOGITS), 0)) == kept(filter_top_k(jnp.asarray(LOGITS), 9)) == [[*range(5)]] * 2


def test_top_p_keeps_the_fewest_that_reach_the_sum():
    assert kept(filter_top_p(jnp.asarray(LOGITS), 0.6)) == [[1, 3], [0]]
    assert kept(filter_top_p(jnp.asarray(LOGITS), 0.01)) == [[1], [0]]
    assert kept(filter_top_p(jnp.asarray(LOGITS), 1.0)) == [[*range(5)]] * 2


def test_draws_follow_the_probabilities():
    rows = 4000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (rows, 5))
    numbers = jnp.arange(rows, dtype=jnp.int32)
    drawn = jax.jit(lambda: sample(logits, row_keys(0, numbers, numbers), Sampling(temperature=0.5, top_k=3)))()
    desired = np.where(np.isin(range(5), [1, 3, 4]), np.exp(LOGITS[0]) ** 2, 0)  # half the temperature squares them
    shares = np.bincount(np.asarray(drawn), minlength=5) / rows
    assert np.abs(shares - desired / desired.sum()).max() < 0.03  # four standard deviations
    assert sample(jnp.asarray(LOGITS), row_keys(0, numbers[:2], numbers[:2]), Sampling()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"temperature": -1.0}, "temperature=-1.0 must not be negative"), ({"top_p": 0.0}, r"top_p=0.0 must lie in")],
)
def test_sampling_refuses_what_means_nothing(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)
