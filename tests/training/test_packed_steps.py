"""A step on packed documents: padding has no influence, and the loss is the mean over all labels of the batch."""

import jax
import numpy as np
import pytest

from tests.builders.batches import counting_corpus, make_batches
from tests.builders.runs import small_config
from tsp_jax.layout import place
from tsp_jax.ops.kernels.mask import PADDING
from tsp_jax.training.data import IGNORE, Batch
from tsp_jax.training.step import make_program

pytestmark = pytest.mark.usefixtures("optax_promotes")

DOCUMENTS = (30, 2, 9, 25, 3, 17, 31, 8, 20, 12)
MESHES = {"single": ("single", {"data": 1}, 1), "tsp": ("tsp", {"data": 2, "tsp": 2}, 2)}
"""name -> (layout, mesh, micro-batches)"""
TOLERANCE = 1e-5
"""relative; float32 sums in another order differ by about 1e-6"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Mesh -> function that changes the first batch and returns (batches, changed batch, metrics of the first step)."""
    return {mesh: make_first_step(mesh, tmp_path_factory.mktemp("run")) for mesh in MESHES}


def make_first_step(mesh: str, folder):
    layout, sizes, accumulate = MESHES[mesh]
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    config = small_config(folder, layout=layout, mesh=text, seq_len=32, batch=8, accumulate=accumulate, z_loss=1e-3)
    placement = place(layout, **sizes)
    program = make_program(config, placement)
    batches = make_batches(
        counting_corpus(DOCUMENTS), batch=8, seq_len=32, packing="best-fit", shuffle=False,
        sequence_shards=placement.size("sequence"),
    )  # fmt: skip
    placed = jax.tree.map(np.asarray, batches.place(0, program.batch_sharding, accumulate=accumulate))

    def first_step(change=lambda batch: batch):
        batch = change(placed)
        _, metrics = program.step(program.init(), jax.device_put(batch, program.batch_sharding))
        return batches, batch, jax.tree.map(np.asarray, metrics)

    return first_step


def micro_counts(batch: Batch) -> list[int]:
    return (np.asarray(batch.labels) != IGNORE).sum(axis=(1, 2)).tolist()


def test_loss_is_the_mean_over_labels_however_they_are_divided(programs):
    (batches, _, want), (_, batch, got) = programs["single"](), programs["tsp"]()
    assert len(set(micro_counts(batch))) > 1  # micro-batches have unequally many labels
    assert got.tokens == want.tokens == (batches.at(0).labels != IGNORE).sum() < batches.num_tokens(0) < 8 * 32
    np.testing.assert_allclose(got.loss, want.loss, rtol=TOLERANCE)
    np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=TOLERANCE)


@pytest.mark.parametrize("mesh", MESHES)
def test_tokens_of_padding_have_no_influence(mesh, programs):
    def fill(batch: Batch) -> Batch:
        padding = batch.segment_ids == PADDING
        assert padding.any()
        return batch._replace(tokens=np.where(padding, 200 + batch.positions % 50, batch.tokens))

    want, got = programs[mesh]()[2], programs[mesh](fill)[2]
    np.testing.assert_allclose(got.loss, want.loss, rtol=TOLERANCE)
    np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=TOLERANCE)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_document_is_read_as_if_it_stood_alone(mesh, programs):
    """The documents that a sequence is packed with do not change the loss of a document."""

    def only_first(batch: Batch) -> Batch:
        return batch._replace(labels=np.where(batch.segment_ids == 1, batch.labels, IGNORE))

    def change_others(batch: Batch) -> Batch:
        return only_first(batch)._replace(tokens=np.where(batch.segment_ids == 1, batch.tokens, 7))

    (_, batch, want), (_, _, got) = programs[mesh](only_first), programs[mesh](change_others)
    assert (batch.segment_ids.max(axis=-1) > 1).any()
    np.testing.assert_allclose(got.loss, want.loss, rtol=TOLERANCE)
