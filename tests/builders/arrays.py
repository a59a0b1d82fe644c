"""What several test files share: layouts to test, packed batches, relative errors."""

import chex
import jax
import numpy as np

from tsp_jax.layout import LAYOUTS, Layout, Placement, get_layout, place
from tsp_jax.training.data import IGNORE, Batch, sequence_order

F32_TOLERANCE = 1e-5
"""relative; sums of a few hundred float32 products in another order differ by about 5e-7"""
BF16_TOLERANCE = 4e-2
"""relative; a bfloat16 has 8 bits, so each rounding is off by up to 4e-3, and an op rounds several times in a row"""


MIX = get_layout("tsp(weights=model+tsp)")
"""a folded axis inside a tensor axis"""
TWO_AXES = get_layout("tsp(sequence=node+gpu,weights=node+gpu)")
"""one fold over two mesh axes"""
TWO_LEVEL = get_layout("tsp(sequence=node+tsp)")
"""weights folded with one of two sequence axes, replicated over the other"""
REPLICAS = get_layout("tsp(weights=data+tsp)")
"""weights folded with the sequence and with the batch: every rank holds another shard"""

LAYOUT_CASES: dict[str, tuple[Layout, dict[str, int]]] = {
    "single": (LAYOUTS["single"], {}),
    "tp8": (LAYOUTS["tp"], {"model": 8}),
    "sp8": (LAYOUTS["sp"], {"seq": 8}),
    "tp2_sp4": (LAYOUTS["tp_sp"], {"model": 2, "seq": 4}),
    "tp4_sp2": (LAYOUTS["tp_sp"], {"model": 4, "seq": 2}),
    "tsp2": (LAYOUTS["tsp"], {"tsp": 2}),
    "tsp3": (LAYOUTS["tsp"], {"tsp": 3}),
    "tsp4": (LAYOUTS["tsp"], {"tsp": 4}),
    "tsp8": (LAYOUTS["tsp"], {"tsp": 8}),
    "data2_tsp4": (LAYOUTS["tsp"], {"data": 2, "tsp": 4}),
    "dp8": (LAYOUTS["dp"], {"data": 8}),
    "fsdp8": (LAYOUTS["fsdp"], {"data": 8}),
    "replicas2_4": (REPLICAS, {"data": 2, "tsp": 4}),
    "fsdp_cp8": (LAYOUTS["fsdp_cp"], {"tsp": 8}),
    "mix2_4": (MIX, {"model": 2, "tsp": 4}),
    "two_level2_4": (TWO_LEVEL, {"node": 2, "tsp": 4}),
}
"""name -> (layout, mesh sizes)"""
UNUSUAL_CASES: dict[str, tuple[Layout, dict[str, int]]] = {
    "two_axes2_4": (TWO_AXES, {"node": 2, "gpu": 4}),
    "fsdp4": (LAYOUTS["fsdp"], {"data": 4}),
    "tp4": (LAYOUTS["tp"], {"model": 4}),
    "mix2_3": (MIX, {"model": 2, "tsp": 3}),
    "mix3_2": (MIX, {"model": 3, "tsp": 2}),
}
"""cases for single ops; the last two have tensor ranks that do not divide 3 or 2 KV heads"""


def place_case(name: str) -> Placement:
    """A layout case on the first devices."""
    layout, sizes = (LAYOUT_CASES | UNUSUAL_CASES)[name]
    return place(layout, **{axis: sizes.get(axis, 1) for axis in layout.axis_names})


def packed_batch(batch: int, seq_len: int, vocab_size: int, documents: int = 3, seed: int = 0) -> Batch[np.ndarray]:
    """Random tokens in documents that end at different places in each row, in natural order.

    The last token of a document has no label, nor has another one in ten.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (batch, seq_len))
    labels = np.where(rng.random((batch, seq_len)) < 0.1, IGNORE, np.roll(tokens, -1, axis=1))
    positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
    for row in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, seq_len), documents - 1, replace=False))
        for number, indices in enumerate(np.split(np.arange(seq_len), cuts), start=1):
            segment_ids[row, indices] = number
            positions[row, indices] = np.arange(len(indices))
            labels[row, indices[-1]] = IGNORE
    return Batch(*(array.astype(np.int32) for array in (tokens, labels, positions, segment_ids)))


def reorder(batch: Batch[np.ndarray], order: np.ndarray) -> Batch[np.ndarray]:
    """A batch with its tokens in another order."""
    return Batch(*(array[:, order] for array in batch))


def zigzag(seq_len: int, placement: Placement) -> np.ndarray:
    """[S]: the token that stands at each place."""
    return sequence_order(seq_len, placement.size("sequence"), "zigzag")


def normal(seed: int, *shape: int, std: float = 1.0) -> np.ndarray:
    """Reproducible float32 normals, other for every seed and shape."""
    return (np.random.default_rng([seed, *shape]).normal(size=shape) * std).astype(np.float32)


def relative_error(actual, desired) -> float:
    """Norm of the difference over the norm of what is desired."""
    actual, desired = (np.asarray(array, np.float64) for array in (actual, desired))
    assert actual.shape == desired.shape, f"got shape {actual.shape}, want {desired.shape}"
    size = np.linalg.norm(desired)
    return float(np.linalg.norm(actual - desired) / (size if size else 1.0))


def assert_trees_near(actual, desired, tolerance: float) -> None:
    """Every leaf has a relative error within the tolerance (which not-a-number never is)."""
    chex.assert_trees_all_equal_structs(actual, desired)
    errors = jax.tree.map(relative_error, jax.device_get(actual), jax.device_get(desired))
    far = {
        jax.tree_util.keystr(path): error
        for path, error in jax.tree_util.tree_leaves_with_path(errors)
        if not error <= tolerance
    }
    assert not far, f"relative errors over {tolerance}: {far}"
