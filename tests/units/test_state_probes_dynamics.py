"""What mixers tell of their dynamics, against the states that they carry and the outputs they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.dynamics import Selective, TimeInvariant, read_out
from layers.types import Context
from tests.laws.cases import PACKED, empty_state, functional, inputs

SELECTIVE = ("mamba2_groups", "mamba")


@pytest.mark.parametrize("name", SELECTIVE)
def test_the_state_is_what_the_dynamics_make_of_the_input(name):
    model, params = functional(name)
    assert isinstance(model.bind(model.shapes), Selective)

    @jax.jit
    def both(params, x, state):
        mixer = model.bind(params)
        head, tail = Context.create(2, 9), Context.create(2, 12, previous_position=jnp.full(2, 8))
        _, middle = mixer(x[:, :9], state, head)
        parts = mixer.dynamics(x[:, :9], state, head), mixer.dynamics(x[:, 9:], middle, tail)
        A = parts[0].A
        joined = jax.tree.map(lambda *t: jnp.concatenate(t, 1), *parts)._replace(A=A)
        return joined, read_out(joined), mixer(x[:, 9:], middle, tail)[1]["ssm"]

    dynamics, y, final = jax.tree.map(np.asarray, both(params, inputs(), empty_state(name)))
    x, dt, A, B, C = (np.asarray(t, np.float64) for t in dynamics)
    groups = x.shape[2] // B.shape[2]
    B, C = np.repeat(B, groups, axis=2), np.repeat(C, groups, axis=2)
    S, expected = np.zeros((*x.shape[:1], *x.shape[2:], B.shape[-1])), []
    for t in range(x.shape[1]):
        decay = np.exp(dt[:, t, :, None] * A)[:, :, None]
        S = decay * S + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        expected.append(np.einsum("bhpn,bhn->bhp", S, C[:, t]))
    np.testing.assert_allclose(final.reshape(S.shape), S, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y, np.stack(expected, 1), rtol=1e-4, atol=1e-5)


def test_padding_has_no_step():
    model, params = functional("mamba2_groups")

    def steps(params, x):
        ctx = Context.create(*PACKED.shape, segment_ids=PACKED)
        return model.bind(params).dynamics(x, None, ctx).dt

    dt = np.asarray(jax.jit(steps)(params, inputs()))
    np.testing.assert_array_equal((dt > 0).all(-1), np.asarray(PACKED) != 0)


@pytest.mark.parametrize("name", ["s4", "s4d_lin", "s5_bilinear"])
def test_eigenvalues_are_those_of_a_step_without_input(name):
    model, params = functional(name)
    mixer = model.bind(params)
    assert isinstance(mixer, TimeInvariant) and not isinstance(mixer, Selective)
    basis = jnp.asarray(np.random.default_rng(0).normal(size=empty_state(name).shape), jnp.float32)
    if name == "s4":  # one row a state: the columns of the matrix
        basis = jnp.tile(jnp.eye(basis.shape[-1])[:, None], (1, basis.shape[1], 1))
    step = jax.jit(lambda params, x, s: model.bind(params)(x, s, Context.create(*x.shape[:2]))[1])
    after = np.asarray(step(params, jnp.zeros((len(basis), 1, mixer.d_model)), basis))
    eigenvalues = np.exp(np.asarray(mixer.log_eigenvalues()))
    if name == "s4":
        power_sums = [np.linalg.matrix_power(after.transpose(1, 2, 0), k) for k in (1, 2, 3)]
        for k, power in enumerate(power_sums, 1):
            trace = np.trace(power, axis1=1, axis2=2)
            np.testing.assert_allclose((eigenvalues**k).sum(-1), trace, rtol=1e-4, atol=1e-4)
        return
    pairs = np.asarray(basis)[..., 0] + 1j * np.asarray(basis)[..., 1]
    expected = eigenvalues.reshape(pairs.shape[1:]) * pairs
    np.testing.assert_allclose(after[..., 0] + 1j * after[..., 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["s4", "dss_softmax", "s5_zoh"])
def test_the_response_is_that_to_an_impulse(name):
    model, params = functional(name)
    length, width = 12, model.bind(model.shapes).d_model

    @jax.jit
    def both(params):
        mixer = model.bind(params)
        impulse = jnp.zeros((width, length, width)).at[jnp.arange(width), 0, jnp.arange(width)].set(1.0)
        if name.startswith("s5"):
            y = mixer.system(impulse, None, None)[0].at[:, 0].add(-jnp.diag(mixer.D[...]))
            return mixer.response(length), jnp.sqrt((y**2).sum((0, 2)))[None]
        y, _ = mixer.recurrence(impulse, 0, jnp.zeros((width, *mixer.state_shape())), None)
        return mixer.response(length), jnp.abs(jnp.diagonal(y, axis1=0, axis2=2).T)

    found, expected = both(params)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
