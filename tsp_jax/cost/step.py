"""A configuration on a mesh, as the closed forms see it: each op's sharding, movement and buckets."""

from collections.abc import Callable, Mapping
from functools import partial

from tsp_jax.config import Config
from tsp_jax.cost.traffic import (
    OpSharding,
    Traffic,
    attention_may_move_tokens,
    choose_movement,
    embed_traffic,
    experts_traffic,
    layers_attention_traffic,
    loss_traffic,
    mlp_traffic,
    repeats_mlp,
)
from tsp_jax.heads import HeadSharding
from tsp_jax.layout import Layout, num_ranks
from tsp_jax.stored import ExpertBiasPadding, ExpertPadding, RowPadding

OPS = "attention", "mlp", "experts", "embed", "loss"
ITEMSIZE = {"float32": 4, "bfloat16": 2}
"""bytes of an element"""


class Step:
    """A configuration on a mesh: each op's sharding and movement. Rows are counted as stored, padding included."""

    def __init__(self, config: Config, layout: Layout, sizes: Mapping[str, int]):
        model, self.config, self.layout, self.sizes = config.model, config, layout, sizes
        self.itemsize, self.grad_itemsize = ITEMSIZE[config.compute_dtype], ITEMSIZE[config.stream.grad_dtype]
        self.bucket_bytes = config.stream.bucket_mib * 2**20
        self.sharding = self.sharding_of("heads")
        self.heads = HeadSharding.of(layout, sizes, model.num_heads, model.num_kv_heads, model.head_dim)
        experts, mlp = model.experts, self.sharding_of("mlp")
        every_token = model.d_ff * (experts.shared if experts.number else 1)
        self.d_ff = RowPadding.over(every_token, num_ranks(layout.mlp, sizes)).stored
        """rows of the MLP, or of that of all shared experts; 0 if there are none"""
        self.experts = ExpertPadding(experts.number, model.d_ff, mlp.tensor, mlp.folded)
        """of all other experts of a layer"""
        self.expert_rows = self.experts.stored
        """their rows; 0 if there are none"""
        biases = ExpertBiasPadding(self.experts, model.d_model).stored if experts.biases else 0
        self.moved_rows = 3 * self.expert_rows + 2 * biases
        """rows of their three weights, and of the biases that move with them"""
        self.vocab_size = RowPadding.over(model.vocab_size, num_ranks(layout.vocab, sizes)).stored

    def sharding_of(self, dim: str) -> OpSharding:
        batch = self.config.batch // self.config.accumulate
        return OpSharding.of(
            self.layout, self.sizes, dim, batch=batch, seq_len=self.config.seq_len,
            itemsize=self.itemsize, grad_itemsize=self.grad_itemsize,
        )  # fmt: skip

    def ops(self) -> dict[str, tuple[str, Callable[..., Traffic]]]:
        """Op -> (its movement, a function that gives its traffic from a movement and `forward`).

        Attention's traffic is that of all layers, that of the MLP and of experts is of one. With experts, the MLP is
        that of all shared experts; without any, there is none.
        """
        stream, model, vocab = self.config.stream, self.config.model, self.sharding_of("vocab")
        attention = partial(
            layers_attention_traffic, self.sharding, heads=self.heads, d_model=model.d_model, windows=model.windows,
            token_order=self.config.data.order, remat=self.config.remat,
        )  # fmt: skip
        repeated = {"d_model": model.d_model, "repeated": repeats_mlp(model.norms != "pre", self.config.remat)}
        mlp = partial(mlp_traffic, self.sharding_of("mlp"), d_ff=self.d_ff, **repeated)
        experts = partial(
            experts_traffic, self.sharding_of("mlp"), stored_rows=self.moved_rows, per_token=model.experts.per_token,
            **repeated,
        )  # fmt: skip
        table = {"d_model": model.d_model, "vocab_size": self.vocab_size}
        functions: dict[str, tuple[str, Callable[..., Traffic]]] = {
            "attention": (stream.attention_movement, attention),
            **({"mlp": (stream.mlp_movement, mlp)} if self.d_ff else {}),
            **({"experts": (stream.mlp_movement, experts)} if self.expert_rows else {}),
            "embed": (stream.vocab_movement, partial(embed_traffic, vocab, **table)),
            "loss": (stream.vocab_movement, partial(loss_traffic, vocab, **table)),
        }
        may_move = dict.fromkeys(functions, True)
        may_move["attention"] = attention_may_move_tokens(self.layout.axes("heads"), self.heads)
        return {
            op: (
                "gather" if self.layout.whole_weights else choose_movement(movement, traffic, may_move[op]),
                traffic,
            )
            for op, (movement, traffic) in functions.items()
        }

    def adapters(self) -> tuple[float, float]:
        """Elements per device: (of the adapters of all layers, of the weights of one layer that have adapters)."""
        model, (query_rows, kv_rows) = self.config.model, self.heads.stored
        rows = {"q": query_rows, "o": query_rows, "k": kv_rows, "v": kv_rows}
        own = [
            rows[name] / num_ranks(self.layout.heads, self.sizes) if name in rows
            else self.d_ff / num_ranks(self.layout.mlp, self.sizes)
            for name in self.config.lora.targets
        ]  # fmt: skip
        factors = self.config.lora.rank * (sum(own) + len(own) * model.d_model)
        return model.num_layers * factors, sum(own) * model.d_model

    def expert_buckets(self) -> int:
        """Number of buckets of the experts' weights, each of whole experts of every rank."""
        if self.layout.whole_weights:
            return 1
        elements = self.moved_rows * self.config.model.d_model
        own = self.experts.stored_experts // self.experts.folded
        return self.sharding_of("mlp").weight_buckets(own, elements, self.bucket_bytes)

    def bucket_elements(self) -> float:
        """Elements of the largest bucket of weights, before tensor axes shard it."""
        model, heads, sharding, bucket_bytes = self.config.model, self.heads, self.sharding, self.bucket_bytes
        query_rows, kv_rows = heads.stored
        rows = self.d_ff // num_ranks(self.layout.mlp, self.sizes)
        counts = sharding.head_buckets(heads, model.d_model, bucket_bytes)
        buckets = [(query_rows, counts[0]), (2 * kv_rows, counts[1])]
        if self.d_ff:
            elements = 3 * self.d_ff * model.d_model
            buckets.append((3 * self.d_ff, sharding.weight_buckets(rows, elements, bucket_bytes)))
        if self.expert_rows:
            buckets.append((self.moved_rows, self.expert_buckets()))
        whole = self.layout.whole_weights
        return max(size / (1 if whole else count) for size, count in buckets) * model.d_model
