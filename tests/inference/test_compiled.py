"""Contracts on the compiled programs of prefill and decode: bytes moved, memory, recompilation."""

import dataclasses
import functools
import math

import pytest

from tests.builders.arrays import place_case
from tests.builders.serving import BATCH, CHUNK, WIDE, config_of, make_prompts, program_of, served
from tsp_jax.config import Config
from tsp_jax.cost.serving import decode_traffic
from tsp_jax.inference import generate_tokens
from tsp_jax.inspect import compiled_memory, list_buffers, list_collectives, parse


@functools.cache
def compiled(case: str, step: str, model: str = "wide"):
    program = program_of(case, model)
    args = (program.abstract_tokens,) if step == "decode" else program.abstract_chunk
    return getattr(program, step).lower(program.abstract_params, program.abstract_cache, *args).compile()


DECODED = [("single", "wide"), ("tsp3", "odd_heads"), ("tsp8", "grouped"), ("tp8", "grouped"), ("sp8", "wide"),
    ("tp2_sp4", "wide"), ("tp4_sp2", "grouped"), ("data2_tsp4", "odd_heads"), ("mix2_4", "wide"), ("mix3_2", "thirds"),
    ("two_axes2_4", "multi_head"), ("two_level2_4", "grouped"),
    ("fsdp4", "multi_head"), ("replicas2_4", "grouped")]  # fmt: skip


@pytest.mark.parametrize(("case", "model"), DECODED)
def test_decode_moves_what_its_closed_form_says(case, model):
    """To the byte, by op; the form knows neither weights nor the length of the cache."""
    placement = place_case(case)
    sizes = dict.fromkeys(placement.layout.axis_names, 1) | dict(placement.mesh.shape)
    moved = list_collectives(parse(compiled(case, "decode", model).as_text()), dict(placement.mesh.shape))
    messages = {op: [] for op in ("attention", "mlp", "embed", "logits")}
    for c in moved:
        messages[next((op for op in messages if f"tsp/{op}" in c.scope), "logits")].append(c.total_bytes)
    config = dataclasses.replace(config_of(model), batch=BATCH)
    for op, kinds in decode_traffic(config, placement.layout, sizes).items():
        rounding = len(messages[op]) * WIDE.num_layers  # each message is counted in whole bytes
        assert sum(messages[op]) == pytest.approx(sum(kinds.values()), abs=rounding), op


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
