"""Operations of compiled steps are those of the model's own products: no rank computes with padding."""

import dataclasses
from collections import Counter

import pytest

from tests.builders.steps import CONFIG, CPU
from tests.builders.targets import needs_compiler
from tsp_jax.config import Config, ExpertsConfig, ModelConfig
from tsp_jax.cost.flops import mean_keys, model_flops, step_flops
from tsp_jax.hardware.targets import Target, parse_target
from tsp_jax.inspect import parse
from tsp_jax.inspect.flops import declared_or_product_flops
from tsp_jax.plan.compile import Step, compile_step

pytestmark = pytest.mark.usefixtures("optax_promotes")

OPS = {
    "attention/queries": "projections",
    "attention/keys_values": "projections",
    "attention/out": "projections",
    "attention": "attention",
    "mlp": "mlp",
    "experts": "experts",
    "router": "router",
    "expert_biases": "expert_biases",
    "loss": "loss",
}
"""scope -> op of `step_flops`; the first that fits"""


def compiled_flops(config: Config, target: Target, step: Step = "train") -> Counter[str]:
    """Operations per device by op, read from the compiled program."""
    module, found = parse(compile_step(config, target, step).compiled.as_text()), Counter()
    for computation, times in module.executions(fusions=True):
        for i in computation.instructions:
            if flops := times * declared_or_product_flops(computation, i):
                found[next((op for scope, op in OPS.items() if f"tsp/{scope}/" in f"{i.op_name}/"), "other")] += flops
    return found


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (9, 3), (4, 1), (14, 2)])
@pytest.mark.parametrize("layout", ["tsp", "fsdp_cp"])
def test_forward_on_eight_ranks(layout, heads, kv_heads):
    """All products but attention's own, of which the kernel of CPUs computes whole blocks."""
    model = dataclasses.replace(CONFIG.model, num_heads=heads, num_kv_heads=kv_heads, qk_norm=True)
    config = dataclasses.replace(CONFIG, model=model, layout=layout)
    found, desired = compiled_flops(config, CPU, "forward"), step_flops(config, forward=True)
    for op in ("projections", "mlp", "loss"):
        assert found[op] * 8 == pytest.approx(desired[op], rel=1e-9), op


def test_experts_take_the_products_of_the_choices_and_half_a_tile_each():
    """128 choices of each expert on each device, in tiles of 32; a shared expert."""
    experts = ExpertsConfig(number=4, per_token=2, shared=1, biases=True)
    model = dataclasses.replace(CONFIG.model, d_ff=24, experts=experts)
    config = dataclasses.replace(CONFIG, model=model, seq_len=2048)
    found, desired = compiled_flops(config, CPU, "forward"), step_flops(config, forward=True)
    assert found["router"] * 8 == pytest.approx(desired["router"], rel=1e-9)
    assert found["expert_biases"] * 8 == pytest.approx(desired["expert_biases"], rel=1e-9)
    assert found["mlp"] * 8 == pytest.approx(desired["mlp"] / 3, rel=1e-9)
    assert found["experts"] * 8 == pytest.approx(desired["mlp"] * 2 / 3 * 144 / 128, rel=1e-9)


def model_of(vocab_size: int, d_model: int, d_ff: int, heads: tuple[int, int, int]) -> ModelConfig:
    num_heads, num_kv_heads, head_dim = heads
    return ModelConfig(
        vocab_size=vocab_size, d_model=d_model, d_ff=d_ff, num_layers=2, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim,
    )  # fmt: skip


MODELS = {
    "SmolLM2-135M on 8": (model_of(49152, 576, 1536, (9, 3, 64)), 8),
    "Gemma3-1B on 8": (model_of(262144, 1152, 6912, (4, 1, 256)), 8),
    "16 heads of 256 on 64": (model_of(151936, 2048, 8192, (16, 4, 256)), 64),
    "Llama-3-8B on 64": (model_of(128256, 4096, 14336, (32, 8, 128)), 64),
}
"""sizes of models whose heads ranks do not share evenly, with two layers; ranks"""


@pytest.mark.parametrize("remat", ["full", "save_attention", pytest.param("offload_attention", marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "name",
    [name if "on 8" in name else pytest.param(name, marks=pytest.mark.soak) for name in MODELS],
)
def test_training_step_on_mi300x(name, remat):
    """The whole step: what backward repeats, and attention by the Triton kernel."""
    needs_compiler("rocm")
    model, ranks = MODELS[name]
    config = dataclasses.replace(CONFIG, model=model, seq_len=32768, compute_dtype="bfloat16", mesh="", remat=remat)
    config = dataclasses.replace(config, stream=dataclasses.replace(config.stream, bucket_mib=64.0, kernel="triton"))
    found, desired = compiled_flops(config, parse_target(f"mi300x:{ranks}")), step_flops(config, backward_products=7)
    per_device = {op: flops / ranks for op, flops in desired.items()}
    assert dict(found) == pytest.approx(per_device, rel=0.01)


def test_attention_within_windows_on_mi300x():
    """A tile of queries visits the tiles of its window, and at most two tiles more, of 128 or fewer keys each."""
    needs_compiler("rocm")
    model = dataclasses.replace(model_of(32000, 1024, 2048, (8, 8, 128)), window=4096)
    config = dataclasses.replace(CONFIG, model=model, seq_len=65536, compute_dtype="bfloat16", mesh="", remat="none")
    config = dataclasses.replace(config, stream=dataclasses.replace(config.stream, bucket_mib=64.0, kernel="triton"))
    found, desired = compiled_flops(config, parse_target("mi300x:8")), step_flops(config, backward_products=7)
    assert 1 <= found["attention"] * 8 / desired["attention"] <= 1 + 2 * 128 / 4096


def test_operations_fall_with_the_window():
    """Token i attends to min(i + 1, W) tokens."""

    def attention(window: int | None) -> float:
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, window=window))
        return step_flops(config)["attention"]

    length, window = CONFIG.seq_len, CONFIG.seq_len // 8
    pairs = sum(min(i + 1, window) for i in range(length))
    assert attention(window) / attention(None) == pytest.approx(pairs / (length * (length + 1) / 2))
    assert attention(2 * length) == attention(None)


@pytest.mark.parametrize("window", [None, 24])
def test_the_model_needs_three_times_its_forward_pass(window):
    """Backward has two products for each of forward's."""
    model = dataclasses.replace(CONFIG.model, window=window, num_kv_heads=2)
    config = dataclasses.replace(CONFIG, model=model, batch=3)
    tokens = config.batch * config.seq_len
    needed = 3 * sum(step_flops(config, forward=True).values())
    assert model_flops(model, tokens, config.seq_len) == pytest.approx(needed, rel=1e-12)
    executed = sum(step_flops(config).values())
    assert needed < executed, "recomputation does not count"
    without = dataclasses.replace(config, remat="none")
    assert model_flops(model, tokens, config.seq_len) < sum(step_flops(without).values()), "nor does an op's own"


def test_operations_of_llama_3_8b_by_hand():
    """6 N T with N = 7.5e9 (8.03e9 without the embedding table and norms), and 12 L D T (S + 1) / 2 for attention."""
    model = dataclasses.replace(model_of(128256, 4096, 14336, (32, 8, 128)), num_layers=32)
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    weights = 32 * layer + 128256 * 4096
    assert weights == model.num_params - 128256 * 4096 - 65 * 4096
    tokens, length = 131072, 8192
    attention = 12 * 32 * 4096 * (length + 1) / 2
    assert model_flops(model, tokens, length) == pytest.approx(tokens * (6 * weights + attention))
    square = model_flops(model, tokens, length, whole_square=True)
    assert square == pytest.approx(tokens * (6 * weights + 12 * 32 * 4096 * length))
    assert model_flops(model, tokens, length, frozen=True) == pytest.approx(tokens * (4 * weights + attention))
    tied = dataclasses.replace(model, tie_embeddings=True)
    assert model_flops(tied, tokens, length) == model_flops(model, tokens, length), "the table is still the head"


def test_keys_are_the_mean_over_kinds_of_layers():
    """Five sliding layers and a full one, as Gemma 3, and a period that is cut off."""
    model = dataclasses.replace(CONFIG.model, window=8, layer_kinds=("sliding",) * 5 + ("full",), num_layers=8)
    sliding, full = sum(min(i + 1, 8) for i in range(64)) / 64, 65 / 2
    assert mean_keys(model, 64) == pytest.approx((7 * sliding + full) / 8)
    assert mean_keys(dataclasses.replace(model, layer_kinds=()), 64) == pytest.approx(sliding)
    assert mean_keys(dataclasses.replace(model, layer_kinds=("full_nope",), window=None), 64) == pytest.approx(full)
