"""Laws of the whole model on a mesh: one loss whatever the mesh, few collectives along the sequence."""

import itertools
import re

import jax
import numpy as np
import pytest

import train
from runtime.feed import Feed, local_rows
from runtime.mesh import MeshConfig, batch_sharding
from tests.experiments import tiny, write_corpus

AXES = ("data", "fsdp", "tensor", "sequence")
FACTORISATIONS = [f for f in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(f) == 8]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("mesh") / "corpus")


def setup(experiment):
    """On as many devices as its mesh has."""
    mesh = experiment.mesh
    return train.setup(experiment, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence])


def losses(experiment, steps=2):
    """Losses of the first steps; the second depends on the first gradient and update."""
    with jax.default_matmul_precision("highest"):
        s = setup(experiment)
        with jax.set_mesh(s.mesh):
            sharding, size = batch_sharding(s.mesh), experiment.task.batch_size
            state, out = s.init(jax.random.key(0)), []
            with Feed(s.task.train(local_rows(sharding, size)), sharding, size, end_step=steps) as feed:
                for _, batch in feed:
                    state, metrics = s.train_step(state, batch)
                    out.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(out)


@pytest.fixture(scope="module")
def one_device(corpus):
    return losses(tiny(corpus))


def test_every_factorisation_is_covered():
    assert len(FACTORISATIONS) == 20


@pytest.mark.parametrize("shape", FACTORISATIONS, ids=lambda f: "x".join(map(str, f)))
def test_loss_is_the_same_on_every_mesh(corpus, one_device, shape):
    experiment = tiny(corpus, mesh=MeshConfig(*shape))
    if shape[2] == 8:  # eight devices share eight SSM heads; attention needs as many
        experiment.model.attention.num_heads = 8
        experiment.model.attention.head_dim = 4
        with_eight_heads = tiny(corpus)
        with_eight_heads.model.attention = experiment.model.attention
        one_device = losses(with_eight_heads)
    np.testing.assert_allclose(losses(experiment), one_device, rtol=2e-4)


@pytest.mark.parametrize("pattern", ["M", "*"])
def test_collectives_along_the_sequence(corpus, pattern):
    """Forward over four shards of time: per Mamba-2 layer one halo permute and one gather; per attention
    layer the two permutes (keys with values, ids) of the ring's loop. Counted as what a deeper model adds."""
    counts = []
    for depth in (1, 2):
        experiment = tiny(corpus, mesh=MeshConfig(1, 1, 1, 4))
        # Two kinds in a row would be stacked and scanned, and counted once: MLPs keep the layers apart.
        experiment.model.pattern = ("" if depth == 1 else pattern + "-") + pattern
        experiment.model.attention.window = None
        s = setup(experiment)
        with jax.set_mesh(s.mesh):
            sharding = batch_sharding(s.mesh)
            with Feed(s.task.train(), sharding, 8, end_step=1) as feed:
                _, batch = next(feed)
            params = s.init(jax.random.key(0)).params
            hlo = s.eval_step.lower(params, batch).compile().as_text()
        kinds = ("all-gather", "collective-permute", "all-reduce", "all-to-all")
        counts.append([len(re.findall(rf" {kind}(?:-start)?\(", hlo)) for kind in kinds])
    per_layer = dict(
        zip(("all-gather", "collective-permute", "all-reduce", "all-to-all"), np.diff(counts, axis=0)[0])
    )
    expected = {
        "M": {"all-gather": 1, "collective-permute": 1, "all-reduce": 0, "all-to-all": 0},
        "*": {"all-gather": 0, "collective-permute": 2, "all-reduce": 0, "all-to-all": 0},
    }
    assert per_layer == expected[pattern]
