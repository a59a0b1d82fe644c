"""Compiles programs of other packages, as they are, for hardware that is not there, and reports on each.

``python benchmarks/other_programs.py TARGET [NAME ...] [--json FILE]``, with a target such as ``mi300x:8``. A program
compiles in a process of its own, for all devices of the target; the batch is sharded, weights are mostly not. Nothing
runs but what a package computes on the CPU to make its model; weights are shapes, where it allows that.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import parse_target, use_target
from tsp_jax.inspect import compile_for

Shape = jax.ShapeDtypeStruct
REPLICATED, BATCH = P(), P("data")
KEY = jax.eval_shape(lambda: jax.random.key(0))
RAW_KEY = jax.eval_shape(lambda: jax.random.PRNGKey(0))
TRITON = "xla_gpu_enable_triton_gemm"
LIMIT_S = 1800
PROGRAMS: dict[str, Callable[[int], dict[str, Any]]] = {}
"""name -> function from the number of devices to what `compile_for` is called with"""


def program(make: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    PROGRAMS[make.__name__] = make
    return make


def descent(loss: Callable[..., Any], optimizer: Any) -> Callable[..., Any]:
    """A step of gradient descent with an optimizer of optax."""
    import optax

    def step(params: Any, state: Any, *batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def tokens(*shape: int) -> Shape:
    return Shape(shape, jnp.int32)


@program
def haiku_resnet18(n: int) -> dict[str, Any]:
    """dm-haiku's ResNet-18: a training step with batch norm, 32 images of 224 x 224 a device."""
    import haiku as hk
    import optax

    net = hk.transform_with_state(lambda x: hk.nets.ResNet18(1000)(x, is_training=True))
    images, labels = Shape((32 * n, 224, 224, 3), jnp.float32), tokens(32 * n)
    params, state = jax.eval_shape(net.init, RAW_KEY, images)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(params: Any, state: Any, moments: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, new_state = net.apply(params, state, None, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new_state

        (_, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), state, moments

    args = params, state, jax.eval_shape(optimizer.init, params), images, labels
    return {"args": (step, *args), "in_shardings": (*[REPLICATED] * 3, BATCH, BATCH), "donate_argnums": (0, 1, 2)}


@program
def haiku_transformer(n: int) -> dict[str, Any]:
    """The language model among dm-haiku's examples (6 layers, 256 wide): gradients, 4 x 1,024 tokens a device."""
    import haiku as hk
    import optax
    from examples.transformer import model  # pyright: ignore[reportMissingImports]

    def forward(x: Any) -> Any:
        return model.LanguageModel(model.Transformer(6, 8, 32, 0.1), 256, 50257, 0)(x)

    net, batch = hk.transform(forward), tokens(4 * n, 1024)

    def loss(params: Any, key: Any, x: Any) -> Any:
        logits = net.apply(params, key, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], x[:, 1:]).mean()

    params = jax.eval_shape(net.init, RAW_KEY, batch)
    return {"args": (jax.grad(loss), params, RAW_KEY, batch), "in_shardings": (REPLICATED, REPLICATED, BATCH)}


@program
def transformers_gpt2(n: int) -> dict[str, Any]:
    """transformers' FlaxGPT2LMHeadModel, as DistilGPT2: an AdamW step with dropout, 4 x 1,024 tokens a device."""
    import optax
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    model = FlaxGPT2LMHeadModel(GPT2Config(n_layer=6), _do_init=False)
    params = jax.eval_shape(lambda key: model.init_weights(key, (1, 1)), RAW_KEY)
    optimizer = optax.adamw(1e-4)

    def loss(params: Any, x: Any, key: Any) -> Any:
        logits = model(x, params=params, dropout_rng=key, train=True).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], x[:, 1:]).mean()

    args = params, jax.eval_shape(optimizer.init, params), tokens(4 * n, 1024), RAW_KEY
    shardings = REPLICATED, REPLICATED, BATCH, REPLICATED
    return {"args": (descent(loss, optimizer), *args), "in_shardings": shardings, "donate_argnums": (0, 1)}


@program
def transformers_llama(n: int) -> dict[str, Any]:
    """transformers' FlaxLlamaForCausalLM, four layers of 7B: logits of 2,048 tokens a device, sharded weights."""
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    model = FlaxLlamaForCausalLM(LlamaConfig(num_hidden_layers=4), dtype=jnp.bfloat16, _do_init=False)
    params = jax.eval_shape(lambda key: model.to_bf16(model.init_weights(key, (1, 1))), RAW_KEY)
    rows = jax.tree.map(lambda x: BATCH if x.shape[0] % n == 0 else REPLICATED, params)
    run = lambda params, x: model(x, params=params).logits
    return {"args": (run, params, tokens(n, 2048)), "in_shardings": (rows, BATCH)}


@program
def transformers_whisper(n: int) -> dict[str, Any]:
    """transformers' FlaxWhisperForConditionalGeneration, the tiny one: logits of 8 x 30 s of sound a device."""
    from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

    model = FlaxWhisperForConditionalGeneration(WhisperConfig(), _do_init=False)
    params = jax.eval_shape(lambda key: model.init_weights(key, (1, 80, 3000)), RAW_KEY)
    sound, words = Shape((8 * n, 80, 3000), jnp.float32), tokens(8 * n, 448)
    run = lambda params, sound, words: model(sound, words, params=params).logits
    return {"args": (run, params, sound, words), "in_shardings": (REPLICATED, BATCH, BATCH)}


@program
def penzai_llama(n: int) -> dict[str, Any]:
    """penzai's Llama-like transformer of 1B, with named axes: logits of 2 x 1,024 tokens a device."""
    from penzai import pz  # pyright: ignore[reportMissingImports]
    from penzai.models.transformer.variants import llamalike_common as llama  # pyright: ignore[reportMissingImports]

    config = llama.LlamalikeTransformerConfig(
        num_kv_heads=8, query_head_multiplier=4, embedding_dim=2048, projection_dim=64, mlp_hidden_dim=8192,
        num_decoder_blocks=16, vocab_size=128256, mlp_variant="swiglu", tie_embedder_and_logits=False,
        use_layer_stack=True,
    )  # fmt: skip
    build = lambda key: pz.unbind_params(llama.build_llamalike_transformer(config, key), freeze=True)
    params, skeleton = jax.eval_shape(lambda key: build(key)[1], KEY), build(None)[0]

    def run(params: Any, x: Any) -> Any:
        model = pz.bind_variables(skeleton, params)
        return model(pz.nx.wrap(x).tag("batch", "seq")).unwrap("batch", "seq", "vocabulary")

    return {"args": (run, params, tokens(2 * n, 1024)), "in_shardings": (REPLICATED, BATCH)}


@program
def flax_nnx_optax(n: int) -> dict[str, Any]:
    """Flax NNX layers, changed in place by an optax optimizer under nnx.jit: convolutions and batch norm on 28 x 28."""
    import optax
    from flax import nnx

    class CNN(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.conv, self.norm = nnx.Conv(1, 64, (3, 3), rngs=rngs), nnx.BatchNorm(64, rngs=rngs)
            self.linear = nnx.Linear(28 * 28 * 64, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.linear(nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1))

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        def loss(model: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    model = CNN(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    x, y = Shape((128 * n, 28, 28, 1), jnp.float32), tokens(128 * n)
    return {"args": (step, model, optimizer, x, y), "in_shardings": (REPLICATED, REPLICATED, BATCH, BATCH)}


@program
def equinox_diffrax(n: int) -> dict[str, Any]:
    """A neural ODE: an Equinox MLP solved by diffrax (Tsit5, adaptive steps), under filter_jit with donation."""
    import diffrax
    import equinox as eqx

    mlp = eqx.nn.MLP(64, 64, 512, 3, key=jax.random.key(0))

    def loss(mlp: Any, y: Any, target: Any) -> Any:
        def solve(y: Any) -> Any:
            controller = diffrax.PIDController(rtol=1e-3, atol=1e-6)
            term = diffrax.ODETerm(lambda t, y, args: mlp(y))
            found = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 1.0, 0.1, y, stepsize_controller=controller)
            return found.ys[0]

        return jnp.mean((jax.vmap(solve)(y) - target) ** 2)

    @eqx.filter_jit(donate="all")
    def step(mlp: Any, y: Any, target: Any) -> Any:
        gradient = eqx.filter_grad(loss)(mlp, y, target)
        return eqx.apply_updates(mlp, jax.tree.map(lambda g: -0.1 * g, gradient))

    y = Shape((256 * n, 64), jnp.float32)
    return {"args": (step, mlp, y, y), "in_shardings": (REPLICATED, BATCH, BATCH)}


@program
def flowjax_flow(n: int) -> dict[str, Any]:
    """flowjax's masked autoregressive flow (8 layers, 16 dims): gradients of the likelihood, 1,024 points a device."""
    import equinox as eqx
    from flowjax.distributions import Normal  # pyright: ignore[reportMissingImports]
    from flowjax.flows import masked_autoregressive_flow  # pyright: ignore[reportMissingImports]
    from flowjax.train.losses import MaximumLikelihoodLoss  # pyright: ignore[reportMissingImports]

    flow = masked_autoregressive_flow(jax.random.key(0), base_dist=Normal(jnp.zeros(16)), nn_width=256)
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    loss = lambda params, x: MaximumLikelihoodLoss()(params, static, x)
    points = Shape((1024 * n, 16), jnp.float32)
    return {"args": (jax.grad(loss), params, points), "in_shardings": (REPLICATED, BATCH)}


@program
def jraph_graph_network(n: int) -> dict[str, Any]:
    """jraph's GraphNetwork (gathers and segment sums) with haiku's MLPs: gradients, 16 x 1,000 nodes a device."""
    import haiku as hk
    import jraph

    def forward(graph: Any) -> Any:
        update = lambda *x: hk.nets.MLP([128, 128])(jnp.concatenate(x, axis=-1))
        return jraph.GraphNetwork(update, update, update)(graph).nodes

    nodes, edges = 1000, 8000
    graph = jraph.GraphsTuple(
        nodes=Shape((nodes, 64), jnp.float32), edges=Shape((edges, 16), jnp.float32), senders=tokens(edges),
        receivers=tokens(edges), globals=Shape((1, 8), jnp.float32), n_node=tokens(1), n_edge=tokens(1),
    )  # fmt: skip
    net = hk.without_apply_rng(hk.transform(forward))
    params = jax.eval_shape(net.init, RAW_KEY, graph)
    graphs = jax.tree.map(lambda x: Shape((16 * n, *x.shape), x.dtype), graph)
    loss = lambda params, graphs: jnp.mean(jax.vmap(lambda g: net.apply(params, g))(graphs) ** 2)
    return {"args": (jax.grad(loss), params, graphs), "in_shardings": (REPLICATED, BATCH)}


@program
def numpyro_nuts(n: int) -> dict[str, Any]:
    """A step of numpyro's NUTS on a logistic regression of 100,000 x 50: loops whose trips depend on data."""
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import NUTS

    def model(x: Any, y: Any) -> None:
        weights = numpyro.sample("weights", dist.Normal(jnp.zeros(50), 1.0).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)

    kernel = NUTS(model, max_tree_depth=6)
    small = np.zeros((2, 50), np.float32), np.zeros(2, np.int32)
    state = kernel.init(jax.random.PRNGKey(0), 10, None, model_args=small, model_kwargs={})
    run = lambda state, x, y: kernel.sample(state, (x, y), {})
    x, y = Shape((100_000, 50), jnp.float32), tokens(100_000)
    return {"args": (run, state, x, y), "in_shardings": (REPLICATED, BATCH, BATCH)}


@program
def mctx_search(n: int) -> dict[str, Any]:
    """mctx's Gumbel MuZero search, 50 simulations of 128 games a device, with a haiku network."""
    import haiku as hk
    import mctx

    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([512, 512, 512 + 18 + 1])(x)))
    state = Shape((128 * n, 512), jnp.float32)
    params = jax.eval_shape(net.init, RAW_KEY, state)

    def recurrent(params: Any, key: Any, action: Any, state: Any) -> Any:
        out = net.apply(params, state + action[:, None])
        zeros = jnp.zeros(out.shape[0])
        found = mctx.RecurrentFnOutput(
            reward=zeros, discount=zeros + 0.99, prior_logits=out[:, 512:530], value=out[:, 530]
        )
        return found, out[:, :512]

    def search(params: Any, key: Any, state: Any) -> Any:
        out = net.apply(params, state)
        root = mctx.RootFnOutput(prior_logits=out[:, 512:530], value=out[:, 530], embedding=out[:, :512])
        return mctx.gumbel_muzero_policy(params, key, root, recurrent, num_simulations=50).action

    return {"args": (search, params, RAW_KEY, state), "in_shardings": (REPLICATED, REPLICATED, BATCH)}


@program
def distrax_hmm(n: int) -> dict[str, Any]:
    """distrax's hidden Markov model (64 states): gradients of forward-backward on 256 x 500 observations a device."""
    import distrax

    def loss(params: Any, x: Any) -> Any:
        hmm = distrax.HMM(
            init_dist=distrax.Categorical(logits=params["start"]), obs_dist=distrax.Normal(params["mean"], 1.0),
            trans_dist=distrax.Categorical(logits=params["step"]),
        )  # fmt: skip
        return -jnp.mean(jax.vmap(lambda x: hmm.forward_backward(x)[3])(x))

    f32 = lambda *shape: Shape(shape, jnp.float32)
    params = {"start": f32(64), "mean": f32(64), "step": f32(64, 64)}
    return {"args": (jax.grad(loss), params, f32(256 * n, 500)), "in_shardings": (REPLICATED, BATCH)}


@program
def optax_muon(n: int) -> dict[str, Any]:
    """optax.contrib.muon (Newton-Schulz products) on haiku's MLP of four layers, 2,048 wide: 512 rows a device."""
    import haiku as hk
    import optax

    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([2048] * 4)(x)))
    x = Shape((512 * n, 2048), jnp.float32)
    params = jax.eval_shape(net.init, RAW_KEY, x)
    optimizer = optax.contrib.muon(0.02)
    step = descent(lambda params, x: jnp.mean(net.apply(params, x) ** 2), optimizer)
    args = params, jax.eval_shape(optimizer.init, params), x
    return {"args": (step, *args), "in_shardings": (REPLICATED, REPLICATED, BATCH), "donate_argnums": (0, 1)}


@program
def e3nn_tensor_square(n: int) -> dict[str, Any]:
    """e3nn_jax's tensor square of spherical harmonics to degree 4, 4,096 points a device, and its gradients."""
    import e3nn_jax as e3nn

    def loss(x: Any) -> Any:
        harmonics = e3nn.spherical_harmonics(range(5), e3nn.IrrepsArray("1o", x), normalize=True)
        return jnp.mean(e3nn.tensor_square(harmonics).array ** 2)

    return {"args": (jax.grad(loss), Shape((4096 * n, 3), jnp.float32)), "in_shardings": BATCH}


def measure(name: str, target_name: str) -> dict[str, Any]:
    """Compiles one program and reports it as plain numbers."""
    target = parse_target(target_name)
    use_target(target)
    call = PROGRAMS[name](target.num_devices)
    (f, *args), options = call.pop("args"), {}
    try:
        done = compile_for(f, *args, target=target, mesh={"data": target.num_devices}, **call)
    except ConfigError as error:
        if TRITON not in str(error):
            raise
        options = {TRITON: False}  # what the refusal says
        done = compile_for(f, *args, target=target, mesh={"data": target.num_devices}, compiler_options=options, **call)
    found = done.report()
    assert found.timeline
    step = found.timeline.band("step_s")
    counts: dict[str, float] = {}
    for c in found.collectives:
        counts[c.op] = counts.get(c.op, 0) + c.count
    return {
        "options": options, "compile_s": round(done.compile_s, 1),
        "peak_bytes": found.peak_bytes, "live_bytes": found.peak.bytes,
        "flops": found.flops, "collectives": counts, "received_bytes": sum(c.total_bytes for c in found.collectives),
        "step_s": [step.low, step.typical, step.high], "assumptions": found.timeline.assumptions,
    }  # fmt: skip


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    if "error" in found:
        return f"| {name} | {found['error']} |"
    low, typical, high = (1e3 * x for x in found["step_s"])
    moved = ", ".join(f"{count:g} {op}" for op, count in found["collectives"].items()) or "none"
    name += " without Triton's products" if found["options"] else ""
    return (
        f"| {name} | {found['peak_bytes'] / 1e9:.3f} | {found['flops'] / 1e9:,.1f} | {moved} | "
        f"{found['received_bytes'] / 1e6:,.1f} | {low:.3g} to {high:.3g} ({typical:.3g}) | {found['compile_s']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", default="")
    parser.add_argument("--one", action="store_true", help="compile one program in this process")
    options = parser.parse_args()
    if options.one:
        try:
            print(json.dumps(measure(options.names[0], options.target)))
        except ConfigError as error:
            print(json.dumps({"error": str(error)}))
        return
    results = {}
    print("| program | peak GB | products, GFLOP | collectives | received MB | step, ms | compiled in s |")
    print("|---|---|---|---|---|---|---|")
    for name in options.names or PROGRAMS:
        command = [sys.executable, "-W", "ignore", __file__, options.target, name, "--one"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        lines = done.stdout.splitlines()
        failed = {"error": f"exit code {done.returncode}: {' '.join(done.stderr.splitlines()[-1:])}"}
        results[name] = json.loads(lines[-1]) if lines and done.returncode == 0 else failed
        print(row(name, results[name]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"target": options.target, "programs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
