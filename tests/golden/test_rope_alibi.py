"""Rotary variants and ALiBi slopes against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from layers.alibi import alibi_slopes
from layers.rope import RopeConfig, apply_rope, rope_frequencies
from tests.conftest import GOLDEN

CONFIGS = {
    "default": RopeConfig(),
    "linear_pi": RopeConfig(scaling="linear", factor=4.0),
    "dynamic_ntk": RopeConfig(scaling="ntk", factor=2.0, original_max_position=64),
    "yarn": RopeConfig(scaling="yarn", factor=4.0, original_max_position=64),
    "llama3": RopeConfig(scaling="llama3", factor=8.0, original_max_position=64),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rope_equals_transformers(name):
    golden, config = np.load(GOLDEN / "rope_variants.npz"), CONFIGS[name]
    length = golden["q"].shape[2]
    inv_freq, factor = rope_frequencies(config, 16, length if name == "dynamic_ntk" else None)
    np.testing.assert_allclose(inv_freq, golden[f"{name}/inv_freq"], rtol=1e-6)
    np.testing.assert_allclose(factor, golden[f"{name}/attention_scaling"], rtol=1e-6)
    for x in ("q", "k"):
        rotated = apply_rope(jnp.swapaxes(golden[x], 1, 2), jnp.arange(length)[None], config)
        # At this length the dynamic base happens to be that of the plain factor: 2 * 96 / 64 - 1 = 2.
        np.testing.assert_allclose(jnp.swapaxes(rotated, 1, 2), golden[f"{name}/{x}_rot"], atol=5e-5)


def test_partial_rotation_leaves_the_rest():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 16)), jnp.float32)
    positions = jnp.arange(5)[None]
    y = apply_rope(x, positions, RopeConfig(fraction=0.5))
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])
    np.testing.assert_allclose(y[..., :8], apply_rope(x[..., :8], positions, RopeConfig()), rtol=1e-6)


@pytest.mark.parametrize("heads", [4, 6, 8, 12])
def test_alibi_slopes_equal_transformers(heads):
    # The stored bias is slope * key index, equal to -slope * (query - key) up to a constant of the row.
    np.testing.assert_allclose(
        alibi_slopes(heads), np.load(GOLDEN / "alibi.npz")[f"alibi_bias_H{heads}"][:, 1], rtol=1e-6
    )


def test_errors():
    with pytest.raises(ValueError, match="rotates 5 dimensions"):
        rope_frequencies(RopeConfig(), 5)
    with pytest.raises(ValueError, match="original_max_position"):
        rope_frequencies(RopeConfig(scaling="yarn", factor=2.0), 8)
