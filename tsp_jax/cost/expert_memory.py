"""Bytes that a device holds while backward computes the gradients of a layer's experts, by part of the peak.

Which buffers there are was read from programs compiled for MI300X (jax 0.10.2; benchmarks/closed_forms.md).

Dims: t tokens of a micro-batch on this device, u tokens whose choices are multiplied with one bucket, D model,
E experts, f this device's rows of an expert, k experts of a token, N choices of a slab.
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

    def router(self) -> float:
        """Scores, their order and their gradients [t, E]; choices, in two orders, and their weights [t, k]."""
        rule = self.passes.rule
        return self.tokens * (3 * rule.number * FLOAT32 + rule.per_token * (3 * INT32 + 3 * FLOAT32))

    def kept(self) -> float:
        """What forward keeps under remat none: x in float32, scores and probabilities [t, E]; choices [t, k]."""
        rule, width = self.passes.rule, self.passes.width
        return self.tokens * ((width + 2 * rule.number) * FLOAT32 + rule.per_token * (3 * INT32 + 2 * FLOAT32))

    def slab(self) -> float:
        """What one iteration of the loop over choices holds, of N rows: those of one tile, or of many.

        x and dy [N, D] in the compute dtype; of [N, f] gate, up and dh in float32, and three arrays in the compute
        dtype. A kernel reads weights where they are. Without it they are copied, gate and up once more as one array;
        the gradients of gate and up are made as one array, before they are added.
        """
        rows, f, width = self.passes.slab_rows, self.passes.experts.shard_rows, self.passes.width
        held = rows * (width * 2 * self.item + f * 3 * (FLOAT32 + self.item))
        return held if self.passes.grouped else held + f * width * (5 * self.item + 2 * FLOAT32)

    def dx(self) -> float:
        """The gradients of x of all choices [u, k, D], which are added at the end."""
        return self.activation * self.passes.rule.per_token * self.item

    def backward(self) -> dict[str, float]:
        """Part -> bytes, the larger of two moments: in the loop over choices, and when a bucket's gradients are sent.

        Without x, its norm, dy and what layers before and after hold.
        """
        moments = self._in_loop(), self._after_loop()
        return max(moments, key=lambda parts: sum(parts.values()))

    def _in_loop(self) -> dict[str, float]:
        """Gradients of a bucket are summed in float32; those of x stand in an array of all choices."""
        weights, activations = self.bucket * (FLOAT32 + self.item), self.dx()
        if self.passes.moves_tokens:  # the next bucket of x and of dy; dx that is sent, and what has come back
            weights += self.own * FLOAT32
            activations += (3 * self.activation + self.tokens * self.passes.width) * self.item
        elif self.part.buckets > 1 and self.folded > 1:
            # The next bucket, and the gradients that are sent. Zeros for the last bucket's are made before the loop.
            weights += self.bucket * (FLOAT32 + self.item + self.grad_item) + self._layer()
        elif self.part.buckets > 1:
            weights += 2 * self.own * FLOAT32
        return self._parts(weights, activations, self.slab())

    def _after_loop(self) -> dict[str, float]:
        """The bucket is used; its gradients are packed into a message, or dx is added."""
        if self.passes.moves_tokens:
            return {}
        weights, activations = self.bucket * FLOAT32, self.dx()
        if self.folded == 1:  # of several buckets, the loop holds more
            return self._parts(weights, activations + self.activation * self.item, 0.0)
        weights += self.bucket * max(self.grad_item, 2 * self.item if self.part.buckets == 1 else 0)
        if self.part.buckets > 1:
            weights += self.bucket * (FLOAT32 + self.item + self.grad_item) + self._layer()
        return self._parts(weights, activations, 0.0)

    def _layer(self) -> float:
        """Float32 weights of the layer, which later buckets are cut from, and the gradients of earlier ones.

        A ring sends its only bucket on.
        """
        if self.passes.rings:
            return 0.0
        return self.own * FLOAT32 * (2 - 1 / self.part.buckets)

    def _parts(self, weights: float, activations: float, products: float) -> dict[str, float]:
        return {"weights": weights, "activations": activations + self.router(), "products": products}
