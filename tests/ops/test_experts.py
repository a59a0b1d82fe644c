"""Router and experts under layouts and movements, value and every gradient, against every expert on every token.

Dims: B batch, S tokens, D model, E experts, F ffn.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.builders.arrays import BF16_TOLERANCE, F32_TOLERANCE, assert_trees_near, normal, place_case
from tests.builders.ops import compiled_value_and_grads
from tsp_jax.config.experts import SLABS
from tsp_jax.errors import ConfigError
from tsp_jax.ops import reference
from tsp_jax.ops.experts import ExpertBiases, _by_expert, _Tiles, experts
from tsp_jax.ops.router import Choices, route
from tsp_jax.ops.stream import Stream
from tsp_jax.stored import ExpertBiasPadding, ExpertPadding

B, S, D, E, F = 8, 24, 20, 10, 14
GRAD_TOLERANCE = 1e-4


class Rule(NamedTuple):
    """A way to route."""

    per_token: int
    scores: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    preferred: tuple[float, ...] = ()
    """the selection bias"""
    biased: bool = False

    def options(self):
        options = self._asdict()
        del options["preferred"], options["biased"]
        return options

    def biases(self, bias_E):
        selection = np.asarray(self.preferred, np.float32) if self.preferred else None
        return {"bias_E": bias_E if self.biased else None, "selection_bias_E": selection}


ONE = Rule(1, scores="sigmoid", normalize=False, preferred=(9.0, *[0.0] * (E - 1)))
"""all tokens go to one expert"""
TWO = Rule(2, biased=True)
NONE_TO_SOME = Rule(2, "sigmoid", scale=2.5, preferred=(0.0, -9.0, 0.0, 0.0, -9.0, -9.0, 0.0, 0.0, -9.0, -9.0))
EIGHT = Rule(8, normalize=False)
CASES = [
    # layout, movement, buckets, tile, rule
    ("single", "gather", 5, 7, TWO),
    ("single", "gather", 1, 512, EIGHT),
    ("tp4", "gather", 2, 16, NONE_TO_SOME),
    ("tsp2", "gather", 5, 5, ONE),
    ("tsp4", "gather", 3, 4, EIGHT),
    ("tsp4", "ring", 1, 4, TWO),
    ("tsp8", "gather", 2, 4, TWO),
    ("tsp8", "activations", 1, 16, NONE_TO_SOME),
    ("fsdp8", "gather", 1, 3, EIGHT),
    ("tp2_sp4", "gather", 5, 4, ONE),
    ("data2_tsp4", "gather", 3, 4, NONE_TO_SOME),
    ("data2_tsp4", "activations", 1, 8, ONE),
    ("mix2_4", "gather", 1, 4, EIGHT),
    ("two_level2_4", "gather", 3, None, TWO),
    ("replicas2_4", "activations", 1, None, EIGHT),
    ("mix2_4", "activations", 1, 16, TWO),
]


def arguments(dtype=jnp.float32):
    """x, router's weights and bias, and the experts' three weights, logical."""
    weights = [normal(seed, E * F, D, std=D**-0.5) for seed in (1, 2, 3)]
    return jnp.asarray(normal(0, B, S, D), dtype), normal(4, E, D, std=0.5), normal(5, E), *weights


def cotangent():
    return normal(6, B, S, D), np.float32(0.7), np.float32(-0.3)


def dense(rule: Rule, x, w_ED, bias_E, *weights):
    chosen, mix, balance, z = reference.route(x, w_ED, **rule.options(), **rule.biases(bias_E))
    return reference.experts(x, chosen, mix, *(w.reshape(E, F, D) for w in weights)), balance, z


@functools.cache
def desired(rule: Rule):
    return compiled_value_and_grads(functools.partial(dense, rule), cotangent(), *arguments())


def sharded(layout: str, stream: Stream, tile: int | None, rule: Rule):
    """The same function as `dense`, on a layout's devices."""
    placement = place_case(layout)
    axes, spec, sizes = placement.layout.axes("mlp"), placement.layout.spec, placement.mesh.shape
    ranks = [int(np.prod([sizes[name] for name in names])) for names in (axes.tensor, axes.folded)]
    padding = ExpertPadding(E, F, *ranks)

    def local(x, w_ED, bias_E, *weights):
        tokens = placement.layout.tokens
        choices, sums = route(x, w_ED, token_axes=tokens, **rule.options(), **rule.biases(bias_E))
        y = experts(x, choices, *weights, num_experts=E, axes=axes, stream=stream, d_ff=F, tile=tile)
        return y, sums.balance, sums.z

    x_spec, w_spec, none = spec("batch", "sequence", None), spec("mlp", None), spec()
    run = placement.shard_map(local, (x_spec, none, none, w_spec, w_spec, w_spec), (x_spec, none, none))
    return lambda x, w_ED, bias_E, *weights: run(x, w_ED, bias_E, *map(padding.pad, weights))


@pytest.mark.parametrize(("layout", "movement", "buckets", "tile", "rule"), CASES)
def test_equals_every_expert_on_every_token(layout, movement, buckets, tile, rule):
    f = sharded(layout, Stream(movement, buckets, token_buckets=3), tile, rule)
    values, grads = compiled_value_and_grads(f, cotangent(), *arguments())
    assert_trees_near(values, desired(rule)[0], F32_TOLERANCE)
    assert_trees_near(grads, desired(rule)[1], GRAD_TOLERANCE)


WIDE = 45
"""F of the experts with biases, which take 1 to 3 rows of D"""
BIASED_CASES = [
    # layout, movement, buckets, tile
    ("single", "gather", 5, 7),
    ("tsp4", "gather", 3, 4),
    ("tsp4", "ring", 1, 4),
    ("tsp8", "activations", 1, 16),
    ("tp4", "gather", 2, 16),
    ("mix2_4", "gather", 3, 4),
]


def biased_arguments():
    """x, router's weights, and the experts' three weights and biases, logical; gates reach the clamp."""
    weights = [normal(seed, E * WIDE, D, std=3 * D**-0.5) for seed in (1, 2, 3)]
    biases = normal(5, E * WIDE), normal(6, E * WIDE), normal(7, E, D)
    return normal(0, B, S, D), normal(4, E, D, std=0.5), *weights, *biases


@functools.cache
def desired_biased():
    def dense(x, w_ED, gate, up, down, b_gate, b_up, b_down):
        chosen, mix, *_ = reference.route(x, w_ED, per_token=3)
        weights, biases = (w.reshape(E, WIDE, D) for w in (gate, up, down)), (b_gate, b_up, b_down)
        biases = [b.reshape(E, -1) for b in biases]
        return reference.experts(x, chosen, mix, *weights, "clamped_swiglu", biases)

    return compiled_value_and_grads(dense, normal(8, B, S, D), *biased_arguments())


@pytest.mark.parametrize(("layout", "movement", "buckets", "tile"), BIASED_CASES)
def test_biases_and_clamped_gates_equal_every_expert_on_every_token(layout, movement, buckets, tile):
    placement = place_case(layout)
    axes, spec, sizes = placement.layout.axes("mlp"), placement.layout.spec, placement.mesh.shape
    ranks = [int(np.prod([sizes[name] for name in names])) for names in (axes.tensor, axes.folded)]
    padding = ExpertPadding(E, WIDE, *ranks)
    bias_padding, stream = ExpertBiasPadding(padding, D), Stream(movement, buckets, token_buckets=3)

    def local(x, w_ED, weights, biases):
        choices, _ = route(x, w_ED, per_token=3, token_axes=placement.layout.tokens)
        return experts(
            x, choices, *weights, num_experts=E, axes=axes, stream=stream, activation="clamped_swiglu", d_ff=WIDE,
            tile=tile, biases=biases,
        )  # fmt: skip

    x_spec, w_spec, none = spec("batch", "sequence", None), spec("mlp", None), spec()
    run = placement.shard_map(local, (x_spec, none, w_spec, ExpertBiases(w_spec, w_spec, none)), x_spec)

    def f(x, w_ED, gate, up, down, b_gate, b_up, b_down):
        weights = tuple(padding.pad(jnp.asarray(w)) for w in (gate, up, down))
        return run(x, w_ED, weights, ExpertBiases(bias_padding.pad(b_gate), bias_padding.pad(b_up), b_down))

    value, grads = compiled_value_and_grads(f, normal(8, B, S, D), *biased_arguments())
    assert_trees_near(value, desired_biased()[0], F32_TOLERANCE)
    assert_trees_near(grads, desired_biased()[1], GRAD_TOLERANCE)


def test_in_bfloat16_is_near_float32():
    """Of the same choices: rounding may change which expert is just preferred."""
    x, w_ED, _, *weights = arguments(jnp.bfloat16)
    chosen, mix, *_ = jax.jit(lambda: reference.route(x, w_ED, per_token=2))()
    biases = normal(7, E * F), normal(8, E * F), normal(9, E, D)

    def f(run):
        return compiled_value_and_grads(run, normal(6, B, S, D), x, mix, *weights, *biases)

    placement = place_case("tsp8")
    spec, padding = placement.layout.spec, ExpertPadding(E, F, folded=8)
    pads = *[padding.pad] * 3, *[ExpertBiasPadding(padding, D).pad] * 2, lambda bias: bias
    tokens, rows = spec("batch", "sequence", None), spec("mlp", None)
    stream = Stream("gather", 2, grad_dtype="bfloat16")

    def local(x, mix, chosen, gate, up, down, *biases):
        choices, axes, biases = Choices(chosen, mix), placement.layout.axes("mlp"), ExpertBiases(*biases)
        return experts(x, choices, gate, up, down, num_experts=E, axes=axes, stream=stream, tile=4, biases=biases)

    run = placement.shard_map(local, (tokens, tokens, tokens, *[rows] * 5, spec()), tokens)
    out, grads = f(lambda x, mix, *args: run(x, mix, chosen, *(pad(a) for pad, a in zip(pads, args, strict=True))))
    assert [array.dtype for array in (out, *grads)] == [jnp.bfloat16, jnp.bfloat16, *(jnp.float32,) * 7]

    def plain(x, mix, gate, up, down, b_gate, b_up, b_down):
        weights = (w.reshape(E, F, D) for w in (gate, up, down))
        biases = b_gate.reshape(E, F), b_up.reshape(E, F), b_down
        return reference.experts(x.astype(jnp.float32), chosen, mix, *weights, biases=biases)

    assert_trees_near((out, grads), f(plain), BF16_TOLERANCE)


def test_takes_arrays_of_numpy():
    """Outside of jit, where nothing else makes them JAX's."""
    x, _, _, *weights = (np.asarray(array) for array in arguments())
    chosen, mix = np.zeros((B, S, 1), np.int32), np.ones((B, S, 1), np.float32)
    y, vjp = jax.vjp(lambda x, *weights: experts(x, Choices(chosen, mix), *weights, num_experts=E), x, *weights)
    dense = reference.experts(x, chosen, mix, *(w.reshape(E, F, D) for w in weights))
    np.testing.assert_allclose(y, dense, rtol=1e-4, atol=1e-5)
    assert np.isfinite(vjp(np.ones_like(y))[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_token": E + 1}, f"per_token={E + 1} does not fit {E} experts; use 1 to {E}"),
        ({"per_token": 0}, "per_token=0 does not fit"),
        ({"per_token": 1, "bias_E": np.zeros(E - 1)}, r"bias_E has shape \(9,\), the router 10 experts; use \(10,\)"),
        ({"per_token": 1, "selection_bias_E": np.zeros(E + 1)}, "selection_bias_E has shape"),
        ({"per_token": 1, "scores": "Softmax"}, "scores=Softmax is unknown; use one of softmax, sigmoid"),
    ],
)
def test_refuses_what_does_not_fit(options, message):
    x, w_ED, *_ = arguments()
    with pytest.raises(ConfigError, match=message):
        route(x, w_ED, **options)


@pytest.mark.parametrize("options", [{"num_experts": 2 * E}, {"num_experts": 3}, {"tile": 0}, {"d_ff": F + 1}], ids=str)
def test_refuses_weights_of_other_experts(options):
    x, _, _, *weights = arguments()
    chosen, mix = jnp.zeros((B, S, 1), jnp.int32), jnp.ones((B, S, 1))
    with pytest.raises(ConfigError, match=rf"experts: {E * F} rows on a device do not suit num_experts="):
        experts(x, Choices(chosen, mix), *weights, **{"num_experts": E, "d_ff": F} | options)


def test_without_d_ff_all_rows_of_all_tensor_ranks_are_real():
    placement = place_case("tp2_sp4")
    axes, spec = placement.layout.axes("mlp"), placement.layout.spec
    x, _, _, *weights = arguments()
    chosen, mix = np.argsort(normal(4, B, S, E), axis=-1)[..., :2].astype(np.int32), np.full((B, S, 2), 0.5, np.float32)
    x_spec, w_spec = spec("batch", "sequence", None), spec("mlp", None)

    def local(x, chosen, mix, *weights):
        return experts(x, Choices(chosen, mix), *weights, num_experts=E, axes=axes)

    run = placement.shard_map(local, (x_spec,) * 3 + (w_spec,) * 3, x_spec)
    stored = map(ExpertPadding(E, F, 2).pad, map(jnp.asarray, weights))
    dense = reference.experts(x, chosen, mix, *(w.reshape(E, F, D) for w in weights))
    assert_trees_near(jax.jit(run)(x, chosen, mix, *stored), dense, F32_TOLERANCE)


def test_tokens_that_are_not_real_do_not_count():
    x_BtD, w_ED, *_ = arguments()
    real_Bt = np.arange(S)[None] < np.arange(1, B + 1)[:, None]
    _, sums = jax.jit(lambda x, real: route(x, w_ED, per_token=2, real_Bt=real))(x_BtD, real_Bt)
    _, expected = route(x_BtD[real_Bt][None], w_ED, per_token=2)
    for got, want in zip(sums, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sigmoid_scores_that_are_all_zero_are_finite():
    choices, sums = route(jnp.ones((1, 2, D)), -20 * jnp.ones((E, D)), per_token=2, scores="sigmoid")
    assert all(np.isfinite(array).all() for array in (choices.weights_Btk, *sums))


def test_balance_loss_is_one_in_balance():
    """Each token prefers another expert, all equally often, and no probability differs from another's mean."""
    x_BtD, w_ED = np.tile(np.eye(D, dtype=np.float32)[:E], (1, 2, 1)), np.eye(E, D, dtype=np.float32)
    _, sums = route(x_BtD, w_ED, per_token=1)
    np.testing.assert_allclose(sums.shares_E, np.full(E, 1 / E), rtol=1e-6)
    np.testing.assert_allclose(sums.balance, 1.0, rtol=1e-6)


@pytest.mark.parametrize("favourite", [None, 0])
def test_the_work_is_that_of_the_choices(favourite):
    """Whatever the router does, all buckets together take one tile more than needed for each expert, at most."""
    tokens, per_token, size, buckets = 64, 4, 8, 5
    chosen = np.argsort(normal(0, tokens, E), axis=1)[:, :per_token]
    if favourite is not None:
        chosen = np.tile(np.arange(per_token), (tokens, 1))
    order, by_expert = _by_expert(jnp.asarray(chosen, jnp.int32)[None])
    tiles = [_Tiles.of(order, by_expert, part, size) for part in np.arange(E, dtype=np.int32).reshape(buckets, -1)]
    number = sum(int(bucket.ends_m[-1]) for bucket in tiles)
    choices = [bucket.slab(jnp.int32(i), 3)[1] for bucket in tiles for i in range(0, int(bucket.ends_m[-1]), 3)]
    needed = tokens * per_token / size
    assert needed <= number <= needed + E
    found = np.sort(np.concatenate(choices, axis=None))
    np.testing.assert_array_equal(found[: chosen.size], np.arange(chosen.size))
    assert (found[chosen.size :] == chosen.size).all()


@pytest.mark.parametrize("each", [256, 300, 1024, 5000, 100_000])
def test_half_filled_tiles_waste_little(each):
    """From 4 K tokens a device on; each token chooses 8 of 128 experts."""
    for slabs in SLABS.values():
        tile = slabs.tile(128 * each, 128)
        assert tile & (tile - 1) == 0
        assert (each + tile / 2) / each <= 1.15
