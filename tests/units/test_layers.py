"""Building blocks against their formulas, and initial values in the ranges their papers give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.embedding import Embedding
from layers.mamba2 import Mamba2, Mamba2Config
from layers.mlp import MLP, MLPConfig
from layers.norm import LayerNorm, RMSNorm
from layers.types import Context, canonical_segments

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12)), jnp.float32)
GATE = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 12)), jnp.float32)
SCALE = jnp.linspace(0.5, 1.5, 12)


def with_values(module, **values):
    """The module's function with other parameters."""
    graphdef, params = nnx.split(module)
    for name, value in values.items():
        params[name] = params[name].replace(value)
    return nnx.merge(graphdef, params)


def plain_rms(x, scale, groups, eps):
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    return (grouped / jnp.sqrt(jnp.mean(grouped**2, -1, keepdims=True) + eps)).reshape(x.shape) * scale


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("order", ["plain", "gate first", "norm first"])
def test_rms_norm_values_and_gradients(groups, order):
    norm = RMSNorm(12, eps=1e-5, groups=groups, norm_before_gate=order == "norm first")

    def ours(x, gate, scale):
        return with_values(norm, scale=scale)(x, None if order == "plain" else gate)

    def formula(x, gate, scale):
        if order == "plain":
            return plain_rms(x, scale, groups, 1e-5)
        if order == "gate first":
            return plain_rms(x * jax.nn.silu(gate), scale, groups, 1e-5)
        return plain_rms(x, scale, groups, 1e-5) * jax.nn.silu(gate)

    np.testing.assert_allclose(ours(X, GATE, SCALE), formula(X, GATE, SCALE), atol=1e-6)
    for f, g in zip(
        *(
            jax.grad(lambda *a, h=h: jnp.sum(jnp.sin(h(*a))), (0, 1, 2))(X, GATE, SCALE)
            for h in (ours, formula)
        )
    ):
        np.testing.assert_allclose(f, g, atol=2e-6)


def test_layer_norm_values_and_gradients():
    def ours(x, scale, bias):
        return with_values(LayerNorm(12), scale=scale, bias=bias)(x)

    def formula(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias

    args = (X, SCALE, SCALE - 1)
    np.testing.assert_allclose(ours(*args), formula(*args), atol=1e-6)
    for f, g in zip(
        *(jax.grad(lambda *a, h=h: jnp.sum(jnp.sin(h(*a))), (0, 1, 2))(*args) for h in (ours, formula))
    ):
        np.testing.assert_allclose(f, g, atol=2e-6)


def test_norm_statistics_are_float32():
    x = jnp.full((1, 4096), 300.0, jnp.bfloat16)  # squares sum to 3.7e8, far beyond bfloat16's integers
    y = RMSNorm(4096)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), 1.0, atol=0.01)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu", lambda h, g: 0.5 * h * (1 + jax.scipy.special.erf(h / 2**0.5))),
        ("gelu_tanh", lambda h, g: 0.5 * h * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (h + 0.044715 * h**3)))),
        ("relu2", lambda h, g: jnp.maximum(h, 0) ** 2),
        ("swiglu", lambda h, g: g / (1 + jnp.exp(-g)) * h),
    ],
)
def test_mlp(activation, formula):
    mlp = MLP(12, MLPConfig(hidden=20, activation=activation, use_bias=True), rngs=nnx.Rngs(0))
    for layer in (mlp.up, mlp.down):
        layer.bias = nnx.Param(0.1 * jnp.arange(layer.bias[...].size))
    h = X @ mlp.up.kernel[...] + mlp.up.bias[...]
    gate = None if mlp.gate is None else X @ mlp.gate.kernel[...] + mlp.gate.bias[...]
    expected = formula(h, gate) @ mlp.down.kernel[...] + mlp.down.bias[...]
    got, state = mlp(X, None, Context.create(2, 5))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert state is None
    assert mlp.flops_per_token(1) == 2 * 12 * 20 * (3 if activation == "swiglu" else 2)


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"mlp.activation='gelo' is unknown; use one of .*'gelu'"):
        MLP(12, MLPConfig(activation="gelo"), rngs=nnx.Rngs(0))


def test_embedding_with_learned_positions_and_tied_head():
    embed = Embedding(7, 12, rngs=nnx.Rngs(0), max_positions=9)
    tokens, positions = jnp.asarray([[3, 0, 6]]), jnp.asarray([[8, 0, 1]])
    table, at = embed.table[...], embed.positions[...]
    np.testing.assert_allclose(embed(tokens, positions, jnp.float32)[0], table[tokens[0]] + at[positions[0]])
    np.testing.assert_allclose(embed.attend(X), X @ table.T, atol=1e-6)


def test_mamba2_initial_dynamics():
    mixer = Mamba2(256, Mamba2Config(d_state=16, headdim=4), rngs=nnx.Rngs(3))
    dt = jax.nn.softplus(mixer.dt_bias[...])
    assert dt.shape == (128,) and dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
    assert dt.min() < 2e-3 and dt.max() > 0.05, "dt must spread over the whole range"
    A = jnp.exp(mixer.A_log[...])
    assert A.min() >= 1 and A.max() <= 16 and A.min() < 2 and A.max() > 15
    np.testing.assert_array_equal(mixer.D[...], 1)
    assert jnp.abs(mixer.conv["x"].weight[...]).max() <= 0.5


def test_mamba2_names_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"mamba2.headdim=48 does not divide the inner width 512"):
        Mamba2(256, Mamba2Config(headdim=48), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"mamba2.n_groups=3 does not divide the 8 heads"):
        Mamba2(256, Mamba2Config(n_groups=3), rngs=nnx.Rngs(0))


def test_canonical_segments():
    raw = jnp.asarray([[0, 0, 5, 5, 0, 7, 7, 5], [3, 3, 4, 4, 4, 0, 0, 0], [0] * 8, [3, 3, 0, 0, 9, 9, 9, 9]])
    runs, continues = canonical_segments(raw, jnp.asarray([5, 2, 3, 0]))
    np.testing.assert_array_equal(
        runs, [[0, 0, 1, 1, 0, 2, 2, 3], [2, 2, 3, 3, 3, 0, 0, 0], [0] * 8, [1, 1, 0, 0, 2, 2, 2, 2]]
    )
    np.testing.assert_array_equal(continues, [True, False, True, True])


def test_positions_count_on_from_the_state():
    raw = jnp.asarray([[0, 5, 5, 0, 7, 7], [4, 4, 4, 4, 4, 4]])
    ctx = Context.create(
        2, 6, segment_ids=raw, previous_segment=jnp.asarray([5, 2]), previous_position=jnp.asarray([10, 4])
    )
    np.testing.assert_array_equal(ctx.positions, [[0, 11, 12, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
