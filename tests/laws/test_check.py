"""Checking a mixer that is in no registry."""

import jax.numpy as jnp
import pytest

from layers.mlp import MLP, MLPConfig
from models.registry import TINY_D_MODEL, TINY_MIXERS
from tests.laws.check import NAME, check


class Ahead(MLP):
    """Reads the next token."""

    def __call__(self, x, state, ctx):
        return super().__call__(jnp.roll(x, -1, axis=1), state, ctx)


def build(kind):
    return lambda rngs: kind(TINY_D_MODEL, MLPConfig(hidden=8), rngs=rngs)


def test_laws_that_are_kept_and_one_that_is_not():
    kept = check(build(MLP), ["causality_to_the_bit", "lengths"])
    assert set(kept.values()) == {""} and "lengths 7" in kept
    broken = check(build(Ahead), ["causality_to_the_bit"])
    assert broken["causality_to_the_bit"].startswith("AssertionError: Arrays are not equal")
    assert NAME not in TINY_MIXERS


def test_a_law_that_does_not_exist():
    with pytest.raises(ValueError, match="there is no law causal; there are .*causality_to_the_bit"):
        check(build(MLP), ["causal"])
