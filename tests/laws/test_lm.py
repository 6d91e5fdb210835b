"""Laws of the whole model on a mesh: one loss whatever the mesh, few collectives along the sequence."""

import itertools
import re

import jax
import numpy as np
import pytest

import train
from pallas_kernels import time_order
from runtime.feed import Feed, local_rows
from runtime.mesh import MeshConfig, batch_sharding
from tests.experiments import tiny, write_corpus

AXES = ("data", "fsdp", "tensor", "sequence")
FACTORISATIONS = [f for f in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(f) == 8]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("mesh") / "corpus")


def tiny_hybrid(corpus, mesh=None):
    """One sub-layer of each kind, with heads enough for eight devices."""
    experiment = tiny(corpus, mesh=mesh)
    experiment.model.pattern = "M*-"
    experiment.model.attention.num_heads, experiment.model.attention.head_dim = 8, 4
    return experiment


def setup(experiment):
    """On as many devices as its mesh has."""
    mesh = experiment.mesh
    return train.setup(experiment, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence])


def loss_and_gradient(experiment):
    """Loss of the first batch, and the norm of its gradient by parameter."""
    s = setup(experiment)
    loss = train.make_loss(s.model, s.objective)

    @jax.jit
    def run(params, batch):
        (total, weight), grads = jax.value_and_grad(
            lambda p: (lambda pair, _: (pair[0] / pair[1], pair[1]))(*loss(p, batch, None, None)),
            has_aux=True,
        )(params)
        return total, jax.tree.map(lambda g: jax.numpy.sqrt((g**2).sum()), grads)

    with jax.default_matmul_precision("highest"), jax.set_mesh(s.mesh):
        sharding, size = batch_sharding(s.mesh), experiment.task.batch_size
        with Feed(
            s.objective.task.train(local_rows(sharding, size)), sharding, size, end_step=1, prefetch=0
        ) as feed:
            _, batch = next(feed)
        params = jax.jit(s.model.init, out_shardings=jax.tree.map(lambda a: a.sharding, s.abstract.params))(
            jax.random.key(0)
        )
        return jax.device_get(run(params, batch))


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-3, atol=1e-6), got[1], want[1])


@pytest.fixture(scope="module")
def one_device(corpus):
    return loss_and_gradient(tiny_hybrid(corpus))


def test_every_factorisation_is_covered():
    assert len(FACTORISATIONS) == 20


@pytest.mark.parametrize("shape", FACTORISATIONS, ids=lambda f: "x".join(map(str, f)))
def test_loss_is_the_same_on_every_mesh(corpus, one_device, shape):
    assert_same(loss_and_gradient(tiny_hybrid(corpus, MeshConfig(*shape))), one_device)


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 2, 2, 2)], ids=lambda f: "x".join(map(str, f)))
def test_loss_is_the_same_in_zigzag_order(corpus, one_device, shape):
    mesh = MeshConfig(*shape, sequence_layout="zigzag")
    assert_same(loss_and_gradient(tiny_hybrid(corpus, mesh)), one_device)


@pytest.mark.parametrize(
    "pattern, layout", [("M", "contiguous"), ("*", "contiguous"), ("M", "zigzag"), ("*", "zigzag")]
)
def test_collectives_along_the_sequence(corpus, pattern, layout):
    """Forward over four shards of time: per Mamba-2 layer one halo permute and one gather; per attention
    layer the permute (keys with values) of the ring's loop. Zigzag order adds a halo, of the second piece.
    Counted as what a deeper model adds."""
    counts = []
    for depth in (1, 2):
        experiment = tiny(corpus, mesh=MeshConfig(1, 1, 1, 4, layout))
        # Two kinds in a row would be stacked and scanned, and counted once: MLPs keep the layers apart.
        experiment.model.pattern = ("" if depth == 1 else pattern + "-") + pattern
        experiment.model.attention.window = None
        s = setup(experiment)
        with jax.set_mesh(s.mesh):
            sharding = batch_sharding(s.mesh)
            with Feed(s.objective.task.train(), sharding, 8, end_step=1) as feed:
                _, batch = next(feed)
            params = s.init(jax.random.key(0)).params
            hlo = s.eval_step.lower(params, None, batch).compile().as_text()
        kinds = ("all-gather", "collective-permute", "all-reduce", "all-to-all")
        counts.append([len(re.findall(rf" {kind}(?:-start)?\(", hlo)) for kind in kinds])
    per_layer = dict(
        zip(("all-gather", "collective-permute", "all-reduce", "all-to-all"), np.diff(counts, axis=0)[0])
    )
    expected = {
        "M": {"all-gather": 1, "collective-permute": time_order.pieces_of(layout)},
        "*": {"all-gather": 0, "collective-permute": 1},
    }
    assert per_layer == {**expected[pattern], "all-reduce": 0, "all-to-all": 0}
