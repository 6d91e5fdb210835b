"""The linear scan of a tile of eight tokens in registers: time in sublanes, channels in lanes.

Three steps of Hillis and Steele on pairs (a, b) that stand for h -> a h + b. Numbers are tuples of planes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import planes
from pallas_kernels.mosaic import SUBLANES
from pallas_kernels.planes import Planes

SHIFTS = (1, 2, 4)


class Walk(NamedTuple):
    """The order in which the rows of a tile are met."""

    backward: bool

    @property
    def last(self) -> slice:
        """The row met last."""
        return slice(0, 1) if self.backward else slice(SUBLANES - 1, SUBLANES)

    def before(self, tile: jax.Array, shift: int, fill: jax.Array | float) -> jax.Array:
        """Each row's value ``shift`` rows earlier in the walk; ``fill`` where there is none."""
        row = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
        met = SUBLANES - 1 - row if self.backward else row
        moved = pltpu.roll(tile, SUBLANES - shift if self.backward else shift, 0)
        return jnp.where(met >= shift, moved, fill)


class Decays(NamedTuple):
    """Products of a tile's decays: with what a row takes, at each step, what stands ``shift`` rows earlier;
    with what it takes what stood before the tile."""

    steps: tuple[Planes, ...]
    product: Planes


def decays(a: Planes, walk: Walk) -> Decays:
    """Of the rows' decays [8, D]. Never divides: decays of zero are resets."""
    steps = []
    for shift in SHIFTS:
        steps.append(a)
        one = (1.0, 0.0)[: len(a)]
        a = planes.multiply(a, tuple(walk.before(plane, shift, fill) for plane, fill in zip(a, one)))
    return Decays(tuple(steps), a)


def scan(over: Decays, b: Planes, carry: Planes, walk: Walk) -> Planes:
    """h of each row [8, D]; ``carry`` [1, D] stood before the first."""
    for shift, a in zip(SHIFTS, over.steps):
        earlier = planes.each(lambda plane, shift=shift: walk.before(plane, shift, 0.0), b)
        b = planes.add(b, planes.multiply(a, earlier))
    return planes.add(b, planes.multiply(over.product, carry))


def last_row(tile: Planes, walk: Walk) -> Planes:
    """[1, D] of the row met last."""
    return planes.each(lambda plane: plane[walk.last], tile)
