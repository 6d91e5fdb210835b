"""The layer against a float64 oracle of the published equations (the authors' code is not public)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.cca import CCAConfig, CoreContextAttention
from layers.rope import RopeConfig, apply_rope
from layers.types import Context
from pallas_kernels.cca import Groups, pool
from tests.conftest import GOLDEN

NAMES = {"q": "Wq", "k": "Wk", "v": "Wv", "out": "Wo"}


@pytest.fixture(scope="module", params=["cca_norope", "cca_rope"])
def golden(request):
    """Vectors, their settings, and ``run(weights, x, state, position, literal, implementation)``."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        vectors = {name: file[name] for name in file.files if name != "meta_json"}
        meta = json.loads(str(file["meta_json"]))

    def layer(literal, implementation=None):
        config = CCAConfig(
            num_heads=meta["heads"],
            position="rope" if meta["rope"] else "none",
            rope=RopeConfig(theta=meta["rope_theta"]),
            group_size=meta["group"],
            window=meta["window"],
            literal_boundary=literal,
            implementation=implementation,
        )
        with nnx.use_eager_sharding(False):
            return CoreContextAttention(meta["D"], config, rngs=nnx.Rngs(0))

    def run(weights, x, state=None, position=None, literal=False, implementation=None):
        module = layer(literal, implementation)
        for name, kernel in weights.items():
            getattr(module, name).kernel.value = kernel
        ctx = Context.create(1, x.shape[0], previous_position=position)
        y, state = module(x[None], state, ctx)
        return y[0], state

    weights = {name: jnp.asarray(vectors[key]) for name, key in NAMES.items()}
    return vectors, meta, weights, layer, jax.jit(run, static_argnames=("literal", "implementation"))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_both_boundaries_and_gradients(golden, implementation):
    vectors, _, weights, _, run = golden
    for literal, name in ((False, "nooverlap"), (True, "literal")):
        y, _ = run(weights, vectors["x"], literal=literal, implementation=implementation)
        np.testing.assert_allclose(y, vectors[f"{name}/y"], atol=2e-5, rtol=1e-4)

    def loss(weights, x):
        return jnp.sum(run(weights, x, implementation=implementation)[0] * vectors["cotangent"])

    by_weight, by_x = jax.grad(loss, (0, 1))(weights, jnp.asarray(vectors["x"]))
    np.testing.assert_allclose(by_x, vectors["grad_nooverlap/x"], atol=5e-5, rtol=1e-3)
    for name, key in NAMES.items():
        np.testing.assert_allclose(by_weight[name], vectors[f"grad_nooverlap/{key}"], atol=5e-5, rtol=1e-3)


def test_decoding(golden):
    """A prompt in two pieces that cut a group, then token by token."""
    vectors, meta, weights, layer, run = golden
    state, start, ys = layer(False).init_state(1, meta["L"]), 0, []
    for size in (7, 10) + (1,) * (meta["L"] - 17):
        position = jnp.full(1, start - 1, jnp.int32)
        y, state = run(weights, vectors["x"][start : start + size], state, position)
        ys.append(y)
        start += size
    np.testing.assert_allclose(jnp.concatenate(ys), vectors["nooverlap/y"], atol=2e-5, rtol=1e-4)
    for name, key in (("core_k", "KG"), ("core_v", "VG")):
        cores = np.asarray(state[name])[0, : vectors[key].shape[1]].swapaxes(0, 1)
        np.testing.assert_allclose(cores, vectors[key], atol=2e-5, rtol=1e-4)


def test_cores(golden):
    vectors, meta, weights, _, _ = golden
    length, heads = meta["L"], meta["heads"]
    q, k, v = ((vectors["x"] @ weights[name]).reshape(1, length, heads, -1) for name in "qkv")
    if meta["rope"]:
        q, k = (apply_rope(x, jnp.arange(length)[None], RopeConfig(meta["rope_theta"])) for x in (q, k))
    groups = Groups.of(1, length, meta["group"], None)
    core_k, core_v = pool(q, k, v, groups, scale=q.shape[-1] ** -0.5)
    for found, key in ((core_k, "KG"), (core_v, "VG")):
        np.testing.assert_allclose(found[0].swapaxes(0, 1), vectors[key], atol=2e-5, rtol=1e-4)
