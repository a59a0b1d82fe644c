"""LoRA: trained low-rank adapters on frozen weights.

A weight W [rows, D] is sharded by rows. Its adapter has two factors: `left` [rows, r], sharded like W, and `right`
[r, D], which every device holds. Before a layer runs, each device adds their product to its own shard of W, in float32:

    forward:  W' = W + s left right                     s = alpha / r; the op streams W' in place of W
    dgrad:    as for W'
    wgrad:    dleft = s dW' right^T,  dright = s left^T dW'         dW' arrives at the owner of its rows, as always

So no op, kernel, layout or movement knows of adapters, and the model is the one that `merge` returns. In LoRA's terms,
left = B and right = A for weights that are stored [outputs, inputs]. For `o` and `down`, which are stored [inputs,
outputs], left = A^T and right = B^T. B is 0 at first.

Moves: dright is summed over the ranks that shard W: one all-reduce of [r, D] for each weight.
Keeps: nothing, unless the remat policy is `none`, which keeps W' as it keeps everything that backward reads. Otherwise
  W' and dW' of one layer live at a time.

The alternative is to add (x A^T) B^T beside each product with W. It needs neither W' nor dW'. For a layer whose weights
have P elements, on n devices with t tokens each:

                                         here                  beside each product
    operations that adapters add         12 r P / n            6 r t (inputs + outputs of all weights)
    operations of dW'                    2 t P                 0
    bytes of dW' received                4 P (n - 1) / n       0
    bytes of W' and dW'                  8 P / n               0
    what changes                         this file             each op: forward, backward, both movements

For `configs/llama_7b.py` (P 268 M, n 8) with r 16 and t 16,384 these are 6.4 GFLOP against 0.15 TFLOP, then 8.8 TFLOP,
0.94 GB and 0.27 GB. With full remat the layer has 35 TFLOP in products with weights and 79 in attention, so dW' is 8 %
of the work; it is 20 % with 16 K tokens in all. benchmarks/lora.md has compiled figures.

Dims: r rank, D model, L layers; rows are those of W: heads x H, or F.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from tsp_jax.config import LoraConfig, Target
from tsp_jax.layout import Placement

WEIGHTS: dict[Target, tuple[str, str, str]] = {
    "q": ("attention", "w_q", "heads"),
    "k": ("attention", "w_k", "heads"),
    "v": ("attention", "w_v", "heads"),
    "o": ("attention", "w_o", "heads"),
    "gate": ("mlp", "w_gate", "mlp"),
    "up": ("mlp", "w_up", "mlp"),
    "down": ("mlp", "w_down", "mlp"),
}
"""target -> (module of a layer, its parameter, logical dimension of the rows)"""
ROWS_ARE_INPUTS = ("o", "down")
"""targets whose weights are stored [inputs, outputs]"""


class Adapter(nnx.Module):
    """The factors of one weight in all layers: `left` [L, rows, r], padded like the weight; `right` [L, r, D].

    Args:
      weight: the weight in all layers, [L, rows, D] as stored.
      rows_are_inputs: which factor is A, drawn at random; the other one is 0.
      config: rank and standard deviation.
      rngs: random number generators; the stream `params` is used.
    """

    def __init__(self, weight: nnx.Param, rows_are_inputs: bool, config: LoraConfig, rngs: nnx.Rngs):
        metadata = weight.get_metadata()
        padding, mesh = metadata["padding"], metadata["mesh"]
        layers, rows, d_model = jax.eval_shape(padding.unpad, jnp.empty(weight.shape)).shape
        std = (3 * (rows if rows_are_inputs else d_model)) ** -0.5 if config.init_std is None else config.init_std

        def factor(random: bool, *shape: int) -> jax.Array:
            init = nnx.initializers.normal(std) if random else nnx.initializers.zeros_init()
            return init(rngs.params(), (layers, *shape), jnp.float32)

        self.left = nnx.Param(
            padding.pad(factor(rows_are_inputs, rows, config.rank)),
            out_sharding=metadata["out_sharding"], mesh=mesh, padding=padding,
        )  # fmt: skip
        right = factor(not rows_are_inputs, config.rank, d_model)
        self.right = nnx.Param(right, out_sharding=PartitionSpec(None, None, None), mesh=mesh)


class Adapters(nnx.Module):
    """An `Adapter` for each target, named like it.

    Args:
      layers: the stacked layers of a decoder.
      config: targets, rank and standard deviation.
      rngs: random number generators; the stream `params` is used.
    """

    def __init__(self, layers: nnx.Module, config: LoraConfig, rngs: nnx.Rngs):
        for name in config.targets:
            module, param, _ = WEIGHTS[name]
            weight = getattr(getattr(layers, module), param)
            setattr(self, name, Adapter(weight, name in ROWS_ARE_INPUTS, config, rngs))


def add(layers: dict, adapters: dict, config: LoraConfig, placement: Placement) -> dict:
    """The parameters of layers with W' in place of each target W.

    Args:
      layers: parameters of one layer or, each [L, ...], of all; any float dtype.
      adapters: target -> {left, right}, of as many layers.
      config: scale of the products.
      placement: layout and mesh.

    Returns:
      A tree like `layers`; each W' is float32 and sharded like W.
    """
    layers = {module: dict(params) for module, params in layers.items()}
    for name, factors in adapters.items():
        module, param, dim = WEIGHTS[name]
        weight = layers[module][param]
        stacked = (None,) * (weight.ndim - 2)
        spec = PartitionSpec(*stacked, *placement.layout.spec(dim, None))

        def add_product(weight: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
            product = jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
            return weight.astype(jnp.float32) + config.scale * product

        sharded = placement.shard_map(add_product, (spec, spec, PartitionSpec()), spec)
        with jax.named_scope("tsp/lora"):
            layers[module][param] = sharded(weight, factors["left"], factors["right"])
    return layers


def split_adapters(params: dict) -> tuple[dict, dict]:
    """(trained, frozen): the adapters of a model and all its other parameters, or all its parameters and none."""
    if "adapters" not in params:
        return params, {}
    return {"adapters": params["adapters"]}, {name: param for name, param in params.items() if name != "adapters"}


def merge(params: dict, config: LoraConfig, placement: Placement) -> dict:
    """The parameters of a model without adapters that computes the same: for export and serving.

    Args:
      params: parameters of a `Transformer` with adapters, in stored form, on the devices; without adapters, they are
        returned as they are.
      config: the adapters.
      placement: layout and mesh.

    Returns:
      Parameters of a `Transformer` without adapters, in stored form; all float32, sharded as in `params`.
    """
    trained, frozen = split_adapters(params)
    if not frozen:
        return params

    def merged(trained: dict, frozen: dict) -> dict:
        layers = add(frozen["layers"], trained["adapters"], config, placement)
        return jax.tree.map(lambda param: param.astype(jnp.float32), {**frozen, "layers": layers})

    shardings = jax.tree.map(lambda param: param.sharding, frozen)
    return jax.jit(merged, out_shardings=shardings)(trained, frozen)


def describe(config: LoraConfig, params: dict) -> str:
    """One line about adapters, with the number of their elements as stored."""
    count = sum(param.size for param in jax.tree.leaves(params))
    return (
        f"LoRA: {count:,} numbers are trained, in adapters of rank {config.rank} on {','.join(config.targets)}; the "
        f"model's own weights are frozen, in {config.base_dtype}"
    )
