"""Bytes that a device holds in a training step, from shapes alone: at the moments at which the peak can be.

What is alive at a moment follows from the ops (`tsp_jax.ops`, `tsp_jax.models.remat`): arrays that later work reads,
products of a chunk, messages on their way. Where that leaves a choice to the compiler, the number of arrays was counted
in programs compiled for MI300X (jax 0.10.2, Triton kernel; benchmarks/closed_forms.md names them).

Dims: t tokens of a micro-batch on this device, D model, F ffn, V vocabulary, L layers; N query heads and K KV heads of
this device, H head; c tokens of a chunk, p rows of a bucket.
"""

from collections.abc import Mapping

from tsp_jax.config import Config
from tsp_jax.cost.expert_memory import ExpertMemory
from tsp_jax.cost.expert_passes import ExpertPasses
from tsp_jax.cost.op_passes import Pass
from tsp_jax.cost.passes import step_passes
from tsp_jax.cost.step import ITEMSIZE, Step
from tsp_jax.cost.traffic import FLOAT32, repeats_attention
from tsp_jax.layout import Layout, num_ranks

Parts = dict[str, float]
"""part -> bytes. `state`: weights and the optimizer's state. `sums`: gradients summed over micro-batches. `residuals`:
what forward keeps for backward on the device. `gradients`: those that wait for the update; where they take the place of
residuals, only what does not fit there. `activations`, `keys_values`, `products`, `weights`, `logits`: transient."""


def step_memory(config: Config, layout: Layout, sizes: Mapping[str, int]) -> Parts:
    """The parts of the peak memory of a training step: those of the largest of `memory_moments`."""
    return max(memory_moments(config, layout, sizes).values(), key=lambda parts: sum(parts.values()))


def memory_moments(config: Config, layout: Layout, sizes: Mapping[str, int]) -> dict[str, Parts]:
    """Moment -> what a device holds then.

    Moments: `loss` (forward or backward); `mlp`, `experts`, `attention` and `projections` of a layer's backward;
    `embed`, its backward after all layers; `update`, the optimizer's.
    """
    return _Memory(config, layout, sizes).moments()


class _Memory:
    """One device's arrays, in bytes."""

    def __init__(self, config: Config, layout: Layout, sizes: Mapping[str, int]):
        step = Step(config, layout, sizes)
        self.step, self.config, self.model, self.item = step, config, config.model, step.itemsize
        self.sharding, heads, width = step.sharding, step.heads, config.model.d_model
        self.tokens = self.sharding.tokens
        self.activation = self.tokens * width * self.item
        """[B, t, D] in the compute dtype"""
        shards = self.sharding.folded * self.sharding.tensor
        rows = 2 * sum(heads.stored) + 3 * step.d_ff + step.moved_rows
        self.matrices = config.model.num_layers * rows * width / shards
        """elements of the layers' weights that are sharded"""
        rule = config.model.experts
        self.routers = config.model.num_layers * rule.number * width * (1 + rule.biases)
        """elements of the routers' weights and of the biases of down, which every device has"""
        vocab = step.sharding_of("vocab")
        self.table = step.vocab_size * width / (vocab.folded * vocab.tensor)
        """elements of the embedding, or of the output head"""
        blocks = {block.name: block.passes for block in step_passes(config, layout, sizes) if block.passes}
        self.mlp = next((part for part in reversed(blocks["backward"]) if part.part == "mlp"), None)
        self.experts = ExpertMemory(ExpertPasses(step)) if step.expert_rows else None
        names = ("out", "queries", "keys_values")
        self.projections = [part for part in blocks["backward"] if part.part in names and part.sent]
        self.loss = blocks["loss"][-1]
        self.queries, self.keys, self.exchange = self._heads()

    def _heads(self) -> tuple[float, float, float]:
        """(queries, keys, keys and values of a bucket of KV heads of all ranks that exchange them)."""
        movement, sharding, heads = self.step.ops()["attention"][0], self.sharding, self.step.heads
        moves = movement == "activations" and sharding.folded > 1
        used, ranks = (heads.own, sharding.sequence // sharding.folded) if moves else (heads.shard, sharding.sequence)
        element = self.tokens * (sharding.folded if moves else 1) * used.dim * self.item
        order = self.config.data.order
        exchanged = max(sharding.exchanged_tokens(movement, window, order) for window, _ in self.model.windows)
        buckets = sharding.exchange_buckets(heads, movement, self.step.bucket_bytes, exchanged)
        tokens = sharding.batch * (exchanged + self.config.seq_len // ranks)
        return element * used.query, element * used.kv, 2 * tokens * used.kv / buckets * used.dim * self.item

    # -------------------------------------------------------------------------------------------- all the time

    def state(self) -> Parts:
        """Weights, the optimizer's state, and sums of gradients over micro-batches."""
        lora, optimizer, layout = self.config.lora, self.config.optimizer, self.step.layout
        trained, frozen = self.matrices + self.routers + self.tables, 0.0
        matrices = self.matrices
        if lora.rank:
            frozen, trained = trained, self.step.adapters()[0]
            matrices = trained
        copies = tuple(name for name in layout.batch if name not in layout.heads)
        replicas = num_ranks(copies, self.step.sizes) if optimizer.zero1 else 1
        moments = {
            "adamw": 2 * trained, "lion": trained, "sgd": trained, "adafactor": 0.0, "muon": 2 * trained - matrices
        }[optimizer.name]  # fmt: skip
        moments *= ITEMSIZE[optimizer.moments_dtype] / replicas
        sums = trained * FLOAT32 / replicas if self.config.accumulate > 1 else 0.0  # sharded like moments
        return {"state": trained * FLOAT32 + moments + frozen * ITEMSIZE[lora.base_dtype], "sums": sums}

    @property
    def tables(self) -> float:
        """Elements of the vocabulary tables."""
        return self.table * (1 if self.model.tie_embeddings else 2)

    def kept(self) -> float:
        """What forward keeps of one layer, on the device or in the host's memory."""
        if self.config.remat != "none":
            outputs = self.queries + self.queries / self.step.heads.heads.dim / self.item * FLOAT32
            return self.activation + (0.0 if repeats_attention(self.config.remat) else outputs)
        # Of each norm: its input, its input times the reciprocal root, and that times the scale, in float32. The inputs
        # of attention and of the MLP in the compute dtype. Queries, keys and values; outputs, once by KV head.
        model, norms = self.model, 4 if self.model.norms == "both" else 2
        elements = self.activation / self.item
        before = (self.queries + self.keys) * (model.qkv_bias or model.qk_norm_width == "all")
        lse = self.queries / self.step.heads.heads.dim / self.item * FLOAT32
        heads = 3 * self.queries + 2 * self.keys + before + lse
        router = self.experts.kept() if self.experts else 0.0
        return 3 * norms * elements * FLOAT32 + 2 * self.activation + heads + router

    def layers(self, backward: bool) -> Parts:
        """What is kept of all layers, and the gradients of their weights, when backward begins or has begun."""
        layers, kept = self.model.num_layers, self.kept()
        trained = self.step.adapters()[0] if self.config.lora.rank else self.matrices + self.routers
        gradients = trained * ITEMSIZE[self.config.grad_dtype]
        if self.config.remat.startswith("offload"):
            return {"residuals": kept if backward else 0.0, "gradients": gradients * backward}
        if self.config.remat == "none":
            return {"residuals": layers * kept + self._copies(), "gradients": gradients * backward}
        return {"residuals": layers * kept, "gradients": max(0.0, gradients - layers * kept)}  # one buffer for both

    def _copies(self) -> float:
        """Weights that forward keeps once more under remat none: those that several ranks of the tokens hold.

        An op makes them differ over these ranks, so the loop over layers does not know them for its argument.
        """
        layout = self.step.layout
        replicas = [name for name in (*layout.batch, *layout.sequence) if name not in layout.heads]
        several = num_ranks(tuple(dict.fromkeys(replicas)), self.step.sizes) > 1
        routers = self.routers * (num_ranks(layout.tokens, self.step.sizes) > 1)
        return (self.matrices * several + routers) * FLOAT32 if not self.config.lora.rank else 0.0

    # -------------------------------------------------------------------------------------------- passes

    def _moves_tokens(self, part: Pass) -> bool:
        return any(message.kind == "activations" for message in part.fetched)

    def products(self, part: Pass) -> float:
        """Products of a chunk in the MLP's backward: gate, up and dh in float32, two of them in the compute dtype."""
        return part.chunk * part.rows * (3 * FLOAT32 + 2 * self.item)

    def bucket(self, part: Pass) -> float:
        """Weights of a bucket on their way, and gradients that are made or sent, of a pass of backward."""
        elements, width = part.weights * part.rows * self.model.d_model, self.model.d_model
        own = elements * part.buckets / self.folded  # float32 weights of one layer, and their gradients
        if self._moves_tokens(part):  # two buckets of x and of dy; dx that is made, and that is sent
            return own * FLOAT32 + 6 * part.chunk * width * self.item
        chunked = part.chunk < self.tokens
        if self.folded == 1:
            return elements * self.item + (2 * own * FLOAT32 if part.buckets > 1 else 0.0)
        if part.buckets == 1:  # the weights are needed no more when the message is made of their gradients' sums
            return elements * (self.step.grad_itemsize + FLOAT32)
        grads = elements * (self.step.grad_itemsize + chunked * FLOAT32 * (2 * part.weights - 1) / part.weights)
        return own * FLOAT32 + grads + (1 if chunked else 2) * elements * self.item

    @property
    def folded(self) -> int:
        """Number of folded ranks."""
        return self.sharding.folded

    def head(self) -> Parts:
        """What is left of the loss while the layers' backward runs: gradients of the output head."""
        if self.config.lora.rank:
            return {"gradients": 0.0}
        part, width = self.loss, self.model.d_model
        whole = self.table * self.folded
        if self._moves_tokens(part):  # the last bucket's product waits, with its operands
            operands = part.chunk * (part.rows + width) * self.item
            return {"gradients": self.table * FLOAT32, "logits": operands}
        if self.folded == 1:  # the embedding's gradients have their buffer already
            return {"gradients": (2 if part.buckets > 1 else 1) * self.table * FLOAT32}
        sent = min(2, part.buckets) / part.buckets
        return {"gradients": (sent * whole + (1 - sent) * self.table) * FLOAT32}

    # -------------------------------------------------------------------------------------------- moments

    def moments(self) -> dict[str, Parts]:
        """See `memory_moments`."""
        during = _added(self.state(), self.layers(backward=True), self.head(), {"weights": self._merged()})
        wide = self.tokens * self.model.d_model * FLOAT32  # a gradient that buckets or chunks add to
        before = self.state(), self.layers(backward=False)
        at_loss = [_added(*before, self._at_loss(wide, backward)) for backward in (False, True)]
        products = self.products(self.mlp) / 3 if self.mlp else 0.0
        experts = self.experts.own * FLOAT32 if self.experts else 0.0  # gradients of the layer's
        return {
            "loss": max(at_loss, key=lambda parts: sum(parts.values())),
            **{name: _added(during, parts) for name, parts in self._at_mlp(wide).items()},
            # dy; queries, their gradients, and those of outputs; keys and values, and their gradients
            "attention": _added(during, {
                "activations": self.activation + 3 * self.queries + 4 * self.keys, "keys_values": 3 * self.exchange,
                "weights": experts,
            }),
            # x, its norm and dy; gradients of queries, keys and values
            "projections": _added(during, {
                "activations": 3 * self.activation + wide + self.queries + 2 * self.keys,
                "weights": self._projections() + experts, "products": products,
            }),
            "embed": _added(self.state(), self.layers(backward=True), self._tables(), {"activations": self.activation}),
            "update": _added(self.state(), self.layers(backward=True), self._tables(), self._orthogonalized()),
        }  # fmt: skip

    def _at_mlp(self, wide: float) -> dict[str, Parts]:
        """The moments of the MLP and of experts: x, its norm and dy, and what the op needs.

        While the experts' backward runs, dx of shared ones waits to be added.
        """
        activations, found = (3 + (self.model.norms != "pre")) * self.activation, {}
        waiting = 0.0
        if (mlp := self.mlp) is not None:
            chunked = mlp.chunk < self.tokens
            waiting = wide if (mlp.buckets > 1 or chunked) and not self._moves_tokens(mlp) else self.activation
            dx = waiting + self.activation * (self.sharding.tensor > 1)  # its sum over tensor shards
            chunks = 2 * mlp.chunk * self.model.d_model * self.item * chunked
            found["mlp"] = {
                "activations": activations + dx + chunks, "products": self.products(mlp), "weights": self.bucket(mlp)
            }  # fmt: skip
        if self.experts:
            found["experts"] = _added({"activations": activations + waiting}, self.experts.backward())
        return found

    def _projections(self) -> float:
        """Float32 gradients of the MLP's weights, and of the last bucket of each projection: made, and sent."""
        mlp = self.mlp.weights * self.mlp.rows * self.mlp.buckets / self.folded if self.mlp else 0.0
        buckets = sum(part.weights * part.rows for part in self.projections)
        return (mlp + 2 * buckets) * self.model.d_model * FLOAT32

    def _orthogonalized(self) -> Parts:
        """Muon orthogonalizes the matrices of all layers at once: momenta, and two products of each with itself."""
        if self.config.optimizer.name != "muon" or self.config.lora.rank:
            return {}
        width, (query, key_value) = self.model.d_model, self.step.heads.stored
        squares = sum(min(rows, width) ** 2 for rows in (2 * [query, key_value] + 3 * [self.step.d_ff]))
        return {"products": 2 * self.model.num_layers * squares * FLOAT32, "weights": self.matrices * FLOAT32}

    def _tables(self) -> Parts:
        """Gradients of the tables after all layers; where the head is the embedding, both and their sum."""
        number = 0 if self.config.lora.rank else 3 if self.model.tie_embeddings else 2
        return {"gradients": number * self.table * FLOAT32}

    def _at_loss(self, wide: float, backward: bool) -> Parts:
        part, width = self.loss, self.model.d_model
        logits, moves = part.chunk * part.rows, self._moves_tokens(part)
        # In forward those of two buckets, where tokens move. In backward their gradients, in the compute dtype, too.
        logits *= FLOAT32 + self.item if backward else FLOAT32 * (1 + moves)
        weights = min(2, 1 if moves else part.buckets) * part.rows * width * self.item
        dx = (self.activation if moves else wide) * backward
        trained = backward and not self.config.lora.rank
        return {
            "activations": 2 * self.activation + dx + (3 + backward) * part.chunk * width * self.item * moves,
            "logits": logits, "weights": weights, "gradients": self.table * FLOAT32 * trained,
        }  # fmt: skip

    def _merged(self) -> float:
        """With LoRA: the sums of one layer's weights and adapters, and their gradients."""
        return self.step.adapters()[1] * 2 * FLOAT32 if self.config.lora.rank else 0.0


def _added(*found: Parts) -> Parts:
    total: Parts = {}
    for parts in found:
        for name, nbytes in parts.items():
            total[name] = total.get(name, 0.0) + nbytes
    return total
