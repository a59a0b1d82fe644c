"""What compiled training steps move and hold, read from the programs and compared with the closed forms."""

import dataclasses
from collections import defaultdict
from functools import cache

import pytest

from tests.builders.arrays import LAYOUT_CASES, MIX, UNUSUAL_CASES
from tests.builders.marks import soak
from tsp_jax.config import TARGETS, Config, ExpertsConfig, LoraConfig, ModelConfig, OptimizerConfig, Order, StreamConfig
from tsp_jax.cost.memory import step_memory
from tsp_jax.cost.step import OPS
from tsp_jax.cost.training import movements, step_traffic
from tsp_jax.inspect import list_buffers, list_collectives, parse
from tsp_jax.layout import Layout, num_ranks, place
from tsp_jax.training.step import make_program

pytestmark = pytest.mark.usefixtures("optax_promotes")

MODEL = ModelConfig(vocab_size=192, d_model=40, num_layers=3, num_heads=16, num_kv_heads=16, head_dim=8, d_ff=192)
CONFIG = Config(
    model=MODEL,
    stream=StreamConfig(
        attention_movement="gather",
        mlp_movement="gather",
        vocab_movement="gather",
        bucket_mib=0.0075,  # two or more buckets in every op
    ),
    optimizer=OptimizerConfig(warmup_steps=1),
    steps=2,
    batch=2,
    seq_len=96,
    compute_dtype="float32",
    remat="save_attention",
)
UNEVEN = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=187, d_ff=185))
"""a vocabulary and an ffn that neither 3 nor 8 ranks divide"""
GROUPED = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, num_heads=9, num_kv_heads=3))


def moved(config: Config, movement: str = "activations") -> Config:
    """The same with another movement in every op."""
    movements = dict.fromkeys(("attention_movement", "mlp_movement", "vocab_movement"), movement)
    return dataclasses.replace(config, stream=dataclasses.replace(config.stream, **movements))


RING = dataclasses.replace(
    CONFIG, stream=dataclasses.replace(CONFIG.stream, mlp_movement="ring", vocab_movement="ring")
)
CASES = LAYOUT_CASES | {
    "data2_tp4": (LAYOUT_CASES["tp8"][0], {"data": 2, "model": 4}),
    "mix4_2": (MIX, {"model": 4, "tsp": 2}),
    **UNUSUAL_CASES,
}


LOOPS = ("while", "body", "closed_call", "eval_jaxpr", "checkpoint")
"""parts of a scope that do not say whether it is forward, repeated forward, or backward"""
SEPARATE = {"xla_disable_hlo_passes": "cpu-all-reduce-combiner,cse"}
"""The CPU compiler merges sums of unlike origin; apart, each can be told by its scope. It also drops optimization
barriers before it looks for common subexpressions, and so spares backward a bucket that forward has just fetched."""


@cache
def compiled_step(config: Config, case: str, forward: bool = False):
    """(module, mesh sizes) of a compiled training step, or of its forward pass."""
    layout, sizes = CASES[case]
    placement = place(layout, **sizes)
    program = make_program(config, placement)
    batch, state = program.abstract_batch((1, config.batch, config.seq_len)), program.abstract_state
    lowered = program.evaluate.lower(state.weights, batch) if forward else program.step.lower(state, batch)
    return parse(lowered.compile(SEPARATE).as_text()), dict(placement.mesh.shape)


def kind_of(collective, layout: Layout) -> str:
    """The kind of `step_traffic` that a collective belongs to; empty if to none."""
    axes = set(collective.axis.split(","))
    if collective.op == "all-reduce":
        if axes <= {a for dim in ("heads", "vocab") for a in layout.axes(dim).tensor}:
            return "tensor_sums"
        return "replica_sums"
    if "_tokens" in collective.scope or ("gather_sequence" in collective.scope and "attention" not in collective.scope):
        return "activations"
    if "window_halos" in collective.scope:
        return "key_value_grads" if "transpose(window_halos)" in collective.scope else "keys_values"
    if "gather_sequence" in collective.scope:
        return "" if collective.dtype.startswith("s32") else "keys_values"
    if "scatter_sequence" in collective.scope:
        return "key_value_grads"
    if "exchange_heads" in collective.scope:
        outer = [part for part in collective.scope.split("/shard_map")[0].split("/") if part not in LOOPS]
        return "weight_grads" if outer[-1].startswith("transpose") else "weights"
    return "weights" if collective.op == "all-gather" else "weight_grads"


def traffic(config: Config, case: str, forward: bool = False) -> dict[str, dict[str, float]]:
    """Bytes by op and kind, as compiled."""
    layout, _ = CASES[case]
    module, mesh = compiled_step(config, case, forward)
    totals = {op: defaultdict(float) for op in OPS}
    for collective in list_collectives(module, mesh):
        for op, kinds in totals.items():
            if f"tsp/{op}" in collective.scope:
                kinds[kind_of(collective, layout)] += collective.total_bytes
    return totals


def check_traffic(config: Config, case: str, forward: bool = False) -> None:
    layout, sizes = CASES[case]
    sizes = {name: sizes.get(name, 1) for name in layout.axis_names}
    config = dataclasses.replace(config, batch=max(config.batch, num_ranks(layout.batch, sizes)))
    moved = traffic(config, case, forward)
    for op, kinds in step_traffic(config, layout, sizes, forward=forward).items():
        got = {kind: moved[op][kind] for kind in kinds}
        assert got == pytest.approx(kinds, rel=1e-6), f"{op} under {case}"


LAYOUTS = [name for name in CASES if name not in UNUSUAL_CASES]
LIKE_OTHERS = ("single", "tp4_sp2", "tsp2", "tsp8", "data2_tp4", "mix4_2")
"""another number of ranks of a layout that is tested, or nothing to move"""


@pytest.mark.parametrize("case", [soak(case) if case in LIKE_OTHERS else case for case in LAYOUTS])
def test_traffic_of_a_step_equals_the_closed_form(case):
    check_traffic(CONFIG, case)


@pytest.mark.parametrize("case", [case if case in ("tsp4", "tp2_sp4", "fsdp8") else soak(case) for case in LAYOUTS])
def test_traffic_of_forward_equals_the_closed_form(case):
    check_traffic(CONFIG, case, forward=True)


@pytest.mark.parametrize("case", ["tsp8", "tp8", soak("tp4_sp2"), soak("mix2_4")])
def test_traffic_with_uneven_heads_equals_the_closed_form(case):
    check_traffic(GROUPED, case)


@pytest.mark.parametrize(
    ("movement", "case", "forward"),
    [
        ("gather", "tsp8", False),
        ("activations", "tsp3", False),
        ("gather", "tp8", True),
        ("activations", "mix2_4", True),
        soak("activations", "tsp8", False),
        soak("gather", "tsp3", False),
        soak("gather", "mix2_4", True),
    ],
)
def test_traffic_of_padded_rows_equals_the_closed_form(movement, case, forward):
    check_traffic(moved(UNEVEN, movement), case, forward)


@pytest.mark.parametrize(
    ("case", "targets", "movement"),
    [("tsp8", TARGETS, "gather"), ("tp2_sp4", ("q", "k", "v", "o"), "gather"), ("mix2_4", ("down",), "gather")],
)
def test_traffic_with_adapters_equals_the_closed_form(case, targets, movement):
    """Frozen tables send no gradients, nor do other ops whose weights have no adapters."""
    check_traffic(dataclasses.replace(moved(CONFIG, movement), lora=LoraConfig(rank=2, targets=targets)), case)


def windowed(window: int, order: Order) -> Config:
    model = dataclasses.replace(MODEL, window=window)
    return dataclasses.replace(CONFIG, model=model, data=dataclasses.replace(CONFIG.data, order=order))


@pytest.mark.parametrize(
    ("case", "window", "order"), [("tsp4", 9, "zigzag"), soak("tsp4", 16, "contiguous"), ("tp4_sp2", 5, "zigzag")]
)
def test_traffic_of_windows_equals_the_closed_form(case, window, order):
    """Each of 4 ranks receives two windows of 8 keys in zigzag order, one of 15 in contiguous order; of 2, one of 4."""
    check_traffic(windowed(window, order), case)
    layout, sizes = CASES[case]
    received = step_traffic(windowed(window, order), layout, {"data": 1, **sizes})["attention"]["keys_values"]
    assert received < step_traffic(CONFIG, layout, {"data": 1, **sizes})["attention"]["keys_values"]


@pytest.mark.parametrize("remat", ["none", "full", soak("offload"), "offload_attention"])
def test_traffic_of_each_remat_policy_equals_the_closed_form(remat):
    check_traffic(dataclasses.replace(CONFIG, remat=remat), "tsp4")


@pytest.mark.parametrize(
    ("case", "movement", "remat"),
    [("tsp4", "gather", "full"), ("tsp4", "activations", "save_attention"), ("tp4_sp2", "gather", "none")],
)
def test_traffic_with_norms_after_sublayers_equals_the_closed_form(case, movement, remat):
    """Backward computes the MLP's output again for the norm that follows, unless forward has kept it."""
    model = dataclasses.replace(MODEL, norms="both")
    check_traffic(dataclasses.replace(moved(CONFIG, movement), model=model, remat=remat), case)


@pytest.mark.parametrize(("case", "movement"), [("tsp4", "gather"), soak("tp4_sp2", "gather")])
def test_traffic_of_layers_of_several_kinds_equals_the_closed_form(case, movement):
    """Two of three layers exchange windows; the third exchanges all keys, after the loop over periods of two."""
    kinds = dataclasses.replace(MODEL, window=9, layer_kinds=("sliding", "full"))
    config = moved(windowed(9, "zigzag"), movement)
    check_traffic(dataclasses.replace(config, model=kinds), case)


@pytest.mark.parametrize(
    ("case", "movement", "shared", "norms"),
    [
        ("tsp8", "gather", 0, "pre"),
        ("tsp4", "activations", 0, "pre"),
        ("mix2_4", "activations", 1, "both"),
        ("tp2_sp4", "gather", 1, "pre"),
        ("tsp3", "gather", 0, "both"),
    ],
)
def test_traffic_of_experts_equals_the_closed_form(case, movement, shared, norms):
    """Ten experts are padded on 8, 4 and 3 ranks; their 13 rows on 2."""
    experts = ExpertsConfig(number=10, per_token=3, shared=shared, balance_loss=0.1)
    model = dataclasses.replace(MODEL, d_ff=13, norms=norms, experts=experts)
    check_traffic(dataclasses.replace(moved(CONFIG, movement), model=model), case)


@pytest.mark.parametrize(("case", "movement"), [("tsp4", "gather"), soak("mix2_4", "activations")])
def test_traffic_of_experts_with_biases_equals_the_closed_form(case, movement):
    """The 85 biases of an expert's gate take three rows of width 40, those of up as many."""
    experts = ExpertsConfig(number=10, per_token=3, router_bias=True, biases=True)
    model = dataclasses.replace(MODEL, d_ff=85, num_layers=2, activation="clamped_swiglu", experts=experts)
    check_traffic(dataclasses.replace(moved(CONFIG, movement), model=model), case)


@pytest.mark.parametrize("case", ["tsp8", soak("data2_tsp4"), "mix2_4", soak("two_axes2_4"), "two_level2_4"])
def test_traffic_of_moved_activations_equals_the_closed_form(case):
    check_traffic(moved(CONFIG), case)


@pytest.mark.parametrize(("case", "remat"), [soak("tsp4", "none"), ("tsp8", "full"), ("mix2_4", "save_attention")])
def test_traffic_of_moved_activations_with_uneven_heads_equals_the_closed_form(case, remat):
    check_traffic(dataclasses.replace(moved(GROUPED), remat=remat), case)


@pytest.mark.parametrize("case", ["tsp3", soak("two_level2_4")])
def test_traffic_of_forward_with_moved_activations_equals_the_closed_form(case):
    check_traffic(moved(CONFIG), case, forward=True)


AUTO = dataclasses.replace(
    moved(CONFIG, "auto"), model=dataclasses.replace(MODEL, num_kv_heads=4, vocab_size=160, d_ff=288)
)
"""a model whose ops prefer to move activations up to different numbers of tokens"""
ACTIVATIONS_PREFERRED = {
    (2, 128): {"attention", "mlp"},
    (4, 136): {"attention"},
    (4, 256): set(),
}
"""(batch, sequence) -> ops"""


@pytest.mark.parametrize(("batch", "seq_len"), ACTIVATIONS_PREFERRED)
def test_auto_moves_no_more_than_the_better_of_the_pinned_movements(batch, seq_len):
    """Of each op, and so of a step. What pinned ones move stands in the closed forms, which are what is compiled."""
    config = dataclasses.replace(AUTO, batch=batch, seq_len=seq_len)
    layout, sizes = CASES["tsp4"][0], {"data": 1, **CASES["tsp4"][1]}
    gather, activations = (step_traffic(moved(config, name), layout, sizes) for name in ("gather", "activations"))
    moves = traffic(config, "tsp4")
    compiled = {op: sum(n for kind, n in moves[op].items() if kind) for op in gather}
    better = {op: min(sum(gather[op].values()), sum(activations[op].values())) for op in gather}
    assert compiled == pytest.approx(better, rel=1e-6)
    preferred = {op for op in gather if compiled[op] < sum(gather[op].values())}
    assert preferred == ACTIVATIONS_PREFERRED[batch, seq_len]
    assert {op for op, name in movements(config, layout, sizes).items() if name == "activations"} == preferred


@pytest.mark.parametrize(
    ("remat", "movement"),
    [
        ("full", "gather"),
        ("save_attention", "activations"),
        soak("full", "activations"),
        soak("save_attention", "gather"),
    ],
)
def test_residuals_of_the_closed_form_are_the_buffers_of_layers(remat, movement):
    """Up to the last row of each array. Tokens are so many that gradients fit in their place."""
    config = dataclasses.replace(moved(CONFIG, movement), remat=remat, seq_len=768)
    module, _ = compiled_step(config, "tsp4")
    layout, sizes = CASES["tsp4"]
    buffers = [b for b in list_buffers(module) if len(b.shape) == 3 and b.shape[::2] == (3, MODEL.d_model)]
    expected = step_memory(config, layout, {"data": 1, **sizes})["residuals"]
    assert max(buffer.bytes for buffer in buffers) == pytest.approx(expected, rel=0.01)


def test_forward_and_backward_move_what_the_paper_says():
    """Without recomputation: 4 D^2 + 3 D F and 2 B S D, twice, and their gradients, times (R - 1) / R."""
    heads = MODEL.num_heads * MODEL.head_dim
    weights = (4 * heads * MODEL.d_model + 3 * MODEL.d_model * MODEL.d_ff) * 4 * 3 / 4
    keys_values = 2 * CONFIG.batch * CONFIG.seq_len * heads * 4 * 3 / 4
    moved = traffic(dataclasses.replace(CONFIG, remat="none"), "tsp4")
    layers = MODEL.num_layers
    assert sum(moved[op]["weights"] for op in ("attention", "mlp")) == layers * 2 * weights
    assert sum(moved[op]["weight_grads"] for op in ("attention", "mlp")) == layers * weights
    assert moved["attention"]["keys_values"] == layers * 2 * keys_values
    assert moved["attention"]["key_value_grads"] == layers * keys_values


# ------------------------------------------------------------------------------------------------ messages


def messages(config: Config, case: str, op: str) -> dict[str, float]:
    """How often each kind of collective runs in an op, in one step."""
    module, mesh = compiled_step(config, case)
    counts = defaultdict(float)
    for collective in list_collectives(module, mesh):
        if f"tsp/{op}" in collective.scope and "_sequence" not in collective.scope:
            counts[collective.op] += collective.count
    return dict(counts)


@pytest.mark.parametrize(("case", "ranks"), [("tsp4", 4), ("tsp3", 3)])
def test_ring_is_one_hop_less_than_ranks_for_each_pass(case, ranks):
    """Passes of the MLP's weights: forward, backward, and their gradients home."""
    assert messages(RING, case, "mlp") == {"collective-permute": 3 * MODEL.num_layers * (ranks - 1)}


def test_ring_moves_as_much_as_gathers():
    layout, sizes = CASES["tsp4"]
    module, mesh = compiled_step(RING, "tsp4")
    found = [c for c in list_collectives(module, mesh) if "tsp/mlp" in c.scope]
    expected = step_traffic(CONFIG, layout, {"data": 1, **sizes})["mlp"]
    assert sum(c.total_bytes for c in found) == expected["weights"] + expected["weight_grads"]


def test_buckets_are_messages():
    """Each bucket of the MLP's packed weights, 92,160 bytes in 12 buckets, is one all-gather."""
    assert messages(CONFIG, "tsp4", "mlp") == {
        "all-gather": 2 * MODEL.num_layers * 12,
        "reduce-scatter": MODEL.num_layers * 12,
    }


def test_fsdp_gathers_whole_weights_at_once():
    assert messages(CONFIG, "fsdp_cp8", "mlp") == {
        "all-gather": 2 * MODEL.num_layers,
        "reduce-scatter": MODEL.num_layers,
    }


# ------------------------------------------------------------------------------------------------ negatives

SLIM = dataclasses.replace(
    CONFIG,
    remat="none",  # else buffers hold what is kept of all layers, and their gradients
    batch=1,
    seq_len=64,
    model=ModelConfig(vocab_size=160, d_model=56, num_layers=2, num_heads=20, num_kv_heads=20, head_dim=8, d_ff=160),
    stream=StreamConfig(bucket_mib=0.0035),
)
"""a model whose every full weight matrix has 160 x 56 elements, and whose buckets are at most a third of that"""
FULL_MATRIX = 160 * 56


def big_buffers(config: Config, case: str) -> list:
    module, _ = compiled_step(config, case)
    return [buffer for buffer in list_buffers(module) if buffer.bytes >= 4 * FULL_MATRIX]


@pytest.mark.parametrize(
    "config",
    [
        SLIM,
        dataclasses.replace(SLIM, stream=dataclasses.replace(SLIM.stream, mlp_movement="ring", vocab_movement="ring")),
    ],
    ids=["gather", "ring"],
)
def test_no_buffer_of_a_tsp_step_is_as_large_as_a_full_weight_matrix(config):
    assert big_buffers(config, "tsp4") == []


def test_whole_weights_do_make_such_buffers():
    """The negative above can fail: FSDP's gathers are found by it."""
    assert any(buffer.opcode == "all-gather" for buffer in big_buffers(SLIM, "fsdp_cp8"))


@pytest.mark.parametrize("case", ["tsp4", "tsp2"])
def test_no_full_sequence_residual(case):
    """Nothing has both the whole sequence and the model dimension."""
    module, _ = compiled_step(SLIM, case)
    found = [b for b in list_buffers(module) if SLIM.seq_len in b.shape and SLIM.model.d_model in b.shape]
    assert found == []


def test_residual_is_found_where_it_is():
    module, _ = compiled_step(SLIM, "tp8")
    assert any(SLIM.seq_len in b.shape and SLIM.model.d_model in b.shape for b in list_buffers(module))


@pytest.mark.parametrize("case", [soak("single"), "tp8", soak("sp8"), "tsp4"])
def test_no_logits_of_all_tokens_and_the_whole_vocabulary(case):
    vocabulary = dataclasses.replace(SLIM, model=dataclasses.replace(SLIM.model, vocab_size=400))
    module, _ = compiled_step(vocabulary, case)
    layout, sizes = CASES[case]
    tokens = SLIM.seq_len
    for axis in layout.sequence:
        tokens //= sizes[axis]
    assert [b for b in list_buffers(module) if 400 in b.shape and tokens in b.shape] == []


def test_no_square_of_scores():
    """Blockwise attention: nothing has two dimensions of a rank's queries and all keys."""
    module, _ = compiled_step(SLIM, "tsp4")
    assert [b for b in list_buffers(module) if b.shape and {16, 64} <= set(b.shape[-2:])] == []
