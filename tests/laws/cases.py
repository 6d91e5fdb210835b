"""What the laws are run on: every mixer of the registry, as a pure function of its parameters."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from layers.types import Context
from models.functional import Functional
from models.registry import TINY_BIDIRECTIONAL, TINY_D_MODEL, TINY_MIXERS

MIXERS, BIDIRECTIONAL = sorted(TINY_MIXERS), sorted(TINY_BIDIRECTIONAL)
BATCH, LENGTH, MAX_LEN = 2, 21, 32  # a length that no chunk, block or window divides


@functools.cache
def functional(name):
    """(Functional, parameters) of a tiny mixer; parameters away from their initial values."""
    model = Functional.create((TINY_MIXERS | TINY_BIDIRECTIONAL)[name])

    @jax.jit
    def noisy(key):
        leaves, tree = jax.tree.flatten(model.init(key))
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            tree, [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys)]
        )

    return model, noisy(jax.random.key(zlib.crc32(name.encode())))


@functools.cache
def compiled(name):
    """``run(params, x, state, segment_ids, previous_segment, previous_position) -> y, state`` under jit."""
    model, _ = functional(name)

    @jax.jit
    def run(params, x, state=None, segment_ids=None, previous_segment=None, previous_position=None):
        ctx = Context.create(
            *x.shape[:2],
            segment_ids=segment_ids,
            previous_segment=previous_segment,
            previous_position=previous_position,
        )
        return model.bind(params)(x, state, ctx)

    return run


def empty_state(name, batch=BATCH, max_len=MAX_LEN):
    model, _ = functional(name)
    return jax.jit(lambda: model.bind(model.shapes).init_state(batch, max_len))()


def inputs(batch=BATCH, length=LENGTH, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, length, TINY_D_MODEL)), jnp.float32)


def stream(name, x, splits, segment_ids=None):
    """Outputs and final state of ``x`` fed in pieces of the given lengths, with carried state."""
    _, params = functional(name)
    run, batch = compiled(name), x.shape[0]
    state, start, ys = empty_state(name, batch), 0, []
    segment, position = jnp.zeros(batch, jnp.int32), jnp.full(batch, -1, jnp.int32)
    for size in splits:
        ids = None if segment_ids is None else segment_ids[:, start : start + size]
        y, state = run(params, x[:, start : start + size], state, ids, segment, position)
        ids = jnp.ones((batch, size), jnp.int32) if ids is None else ids
        segment, position = advance(ids, segment, position)
        start += size
        ys.append(y)
    return jnp.concatenate(ys, 1), state


@jax.jit
def advance(ids, segment, position):
    """Last real segment id and position after a piece: what the model keeps beside the mixers' states."""
    ctx = Context.create(*ids.shape, segment_ids=ids, previous_segment=segment, previous_position=position)
    any_real = (ids != 0).any(axis=1)
    last = ids.shape[1] - 1 - jnp.argmax(ids[:, ::-1] != 0, axis=1)[:, None]
    pick = lambda new, old: jnp.where(any_real, jnp.take_along_axis(new, last, axis=1)[:, 0], old)  # noqa: E731
    return pick(ids, segment), pick(ctx.positions, position)


# Documents of length 1, shorter than a convolution, crossing chunk edges; padding before, between and after.
PACKED = jnp.asarray(
    [
        [0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 0, 0, 4, 4, 4, 4, 4, 4, 4, 0, 0],
        [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 0, 7, 8, 8, 8, 8, 8],
    ],
    jnp.int32,
)


# For gradients: documents of two lengths alone, so that few programs are compiled for them apart.
PACKED_ALIKE = jnp.asarray(
    [
        [0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 0, 0, 4, 0, 5, 0, 0],
        [6, 6, 6, 6, 6, 6, 7, 0, 0, 0, 0, 8, 9, 9, 9, 9, 9, 9, 1, 2, 0],
    ],
    jnp.int32,
)


def documents(segment_ids=PACKED):
    """(row, start, stop) of every document."""
    ids = np.asarray(segment_ids)
    return [
        (row, int(np.flatnonzero(ids[row] == s)[0]), int(np.flatnonzero(ids[row] == s)[-1]) + 1)
        for row in range(ids.shape[0])
        for s in np.unique(ids[row])
        if s
    ]


def documents_by_length(segment_ids):
    """{length: index}, where ``x[index]`` [n, length, ...] are the documents of that length."""
    found = {}
    for row, start, stop in documents(segment_ids):
        found.setdefault(stop - start, []).append((row, start))
    return {
        length: (np.array(places)[:, :1], np.array(places)[:, 1:] + np.arange(length))
        for length, places in found.items()
    }


def close(actual, expected, atol=2e-5, rtol=1e-4):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=atol, rtol=rtol), actual, expected)
