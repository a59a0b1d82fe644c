"""Bytes that a device holds while backward computes the gradients of a layer's experts, by part of the peak.

Which buffers there are was read from programs compiled for MI300X (jax 0.10.2; benchmarks/closed_forms.md).

Dims: t tokens of a micro-batch on this device, u tokens whose choices are multiplied with one bucket, D model,
E experts, f this device's rows of an expert, k experts of a token, n choices of a tile, m experts of a bucket.
"""

from tsp_jax.cost.expert_passes import ExpertPasses
from tsp_jax.cost.traffic import FLOAT32, INT32


class ExpertMemory:
    """The arrays of one layer's experts and of its router on one device, in bytes."""

    def __init__(self, passes: ExpertPasses):
        self.passes, (self.part, _) = passes, passes.backward()
        step, sharding = passes.step, passes.sharding
        self.item, self.grad_item, self.folded = step.itemsize, step.grad_itemsize, sharding.folded
        self.bucket = self.part.weights * self.part.rows * passes.width
        """elements of a bucket's weights"""
        self.own = 3 * step.expert_rows * passes.width / (sharding.folded * sharding.tensor)
        """elements of this device's weights of a layer"""
        self.tokens = sharding.tokens
        self.activation = self.part.chunk * passes.width
        """elements of [u, D]"""
        self.choices = self.activation * passes.rule.per_token * self.item
        """bytes of [u, k, D]"""

    def router(self) -> float:
        """Scores, their order and their gradients [t, E]; choices, in two orders, and their weights [t, k]."""
        rule = self.passes.rule
        return self.tokens * (3 * rule.number * FLOAT32 + rule.per_token * (3 * INT32 + 3 * FLOAT32))

    def kept(self) -> float:
        """What forward keeps under remat none: x in float32, scores and probabilities [t, E]; choices [t, k]."""
        rule, width = self.passes.rule, self.passes.width
        return self.tokens * ((width + 2 * rule.number) * FLOAT32 + rule.per_token * (3 * INT32 + 2 * FLOAT32))

    def slab(self) -> float:
        """What one slab holds: tokens and hidden rows, and without a kernel copies of its expert's weights.

        Of [N, D] x and dy in the compute dtype; of [N, f] gate, up and dh in float32, and their gradients in the
        compute dtype; then dx [N, D] in place of the first three. Without a kernel, weights are copied, gate and up
        once more as one array; the gradients of gate and up are made as one array, before they are added.
        """
        tiling, f, width = self.passes.tiling, self.passes.experts.shard_rows, self.passes.width
        hidden = 3 * f * self.item + max(3 * f * FLOAT32, width * self.item)
        rows = tiling.slab_rows * (2 * width * self.item + hidden)
        return rows + (0 if tiling.grouped else f * width * (5 * self.item + 2 * FLOAT32))

    def backward(self) -> dict[str, float]:
        """Part -> bytes, the larger of two moments: in the loop over choices, and when a bucket's gradients are sent.

        Without x, its norm, dy and what layers before and after hold.
        """
        moments = self._in_loop(), self._after_loop()
        return max(moments, key=lambda parts: sum(parts.values()))

    def _in_loop(self) -> dict[str, float]:
        """Gradients of a bucket are summed in float32; each choice's dx is written."""
        weights = self.bucket * (FLOAT32 + self.item)
        if self.passes.moves_tokens:  # two buckets of x and of dy; dx that is sent, and what has come back
            own = self.own * FLOAT32
            moved = (5 * self.activation + self.tokens * self.passes.width) * self.item
            return self._parts(weights + own, self.choices + moved, self.slab())
        if self.part.buckets > 1 and self.folded > 1:
            # The next bucket, and the gradients that are sent. Zeros for the last bucket's are made before the loop.
            weights += self.bucket * (FLOAT32 + self.item + self.grad_item) + self._layer()
        elif self.part.buckets > 1:
            weights += 2 * self.own * FLOAT32
        return self._parts(weights, self.choices, self.slab())

    def _after_loop(self) -> dict[str, float]:
        """The bucket is used; its gradients are packed into a message, or dx is cast."""
        if self.passes.moves_tokens:
            return {}
        weights, sums = self.bucket * FLOAT32, self.choices
        if self.folded == 1:  # of several buckets, the loop holds more
            return self._parts(weights, sums + self.activation * self.item, 0.0)
        weights += self.bucket * self.grad_item
        if self.part.buckets > 1:
            weights += self.bucket * (FLOAT32 + self.item + self.grad_item) + self._layer()
        return self._parts(weights, sums, 0.0)

    def _layer(self) -> float:
        """Float32 weights of the layer, which later buckets are cut from, and the gradients of earlier ones.

        A ring sends its only bucket on.
        """
        if self.passes.rings:
            return 0.0
        return self.own * FLOAT32 * (2 - 1 / self.part.buckets)

    def _parts(self, weights: float, activations: float, products: float) -> dict[str, float]:
        return {"weights": weights, "activations": activations + self.router(), "products": products}
