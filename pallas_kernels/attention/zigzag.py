"""The way of keys along a window in zigzag order of time.

A window needs the few pieces of time before each piece. On the ring of ``ring.py`` they come last: the piece
before an early one is on the left neighbour, the piece before a late one on the right. So early pieces travel
to the right, turn round on the last device, and travel back as late ones: in the order of time, and
ceil((window - 1) / piece) steps are enough whatever the length, with as many bytes a step as on the ring.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels import time_order
from pallas_kernels.attention.sources import Tokens


@dataclasses.dataclass(frozen=True)
class Path:
    """The mesh axis, its size, how often the keys move on to the next piece's place, and B.

    Queries and keys stand in rows of pieces (``time_order.split``): a row of queries meets one piece of keys
    in each step, first its own, then the one before it, and so on.
    """

    axis: str
    size: int
    rotations: int
    batch: int

    def send(self, x: Shaped[Array, "rows piece *d"]) -> Shaped[Array, "rows piece *d"]:
        """Every piece goes to where the piece after it was; the last to the place of the first."""
        return self._step(x, forward=True)

    def home(self, x: Shaped[Array, "rows piece *d"]) -> Shaped[Array, "rows piece *d"]:
        """Back by all rotations."""
        return jax.lax.fori_loop(0, self.rotations, lambda _, x: self._step(x, forward=False), x)

    def tokens(self, whole: Tokens, positional: bool, step: Array | int, length: int) -> Tokens:
        """Rows of those of ``length`` keys each that a device holds after ``step`` rotations."""
        places = time_order.numbers(jax.lax.axis_index(self.axis), self.size, 2)
        pieces = (places - step) % (2 * self.size)

        def part(x: Array) -> Array:
            starts = [_start(piece, self.size, length) for piece in pieces]
            cuts = [jax.lax.dynamic_slice_in_dim(x, start, length, axis=1) for start in starts]
            return jnp.stack(cuts, axis=1).reshape(-1, length)

        own = jax.tree.map(part, whole)
        if not positional:
            return own
        positions = pieces[:, None] * length + jnp.arange(length, dtype=jnp.int32)
        return own._replace(positions=jnp.tile(positions, (self.batch, 1)))

    def _step(self, x: Array, forward: bool) -> Array:
        here, last = jax.lax.axis_index(self.axis), self.size - 1
        right = [(i, i + 1) for i in range(last)]
        left = [(i + 1, i) for i in range(last)]
        early, late = jnp.moveaxis(x.reshape(self.batch, 2, *x.shape[1:]), 1, 0)
        new_early = jax.lax.ppermute(early, self.axis, right if forward else left)
        new_late = jax.lax.ppermute(late, self.axis, left if forward else right)
        # At both ends a piece stays on its device, and changes places with the other one there.
        new_early = jnp.where(here == (0 if forward else last), late, new_early)
        new_late = jnp.where(here == (last if forward else 0), early, new_late)
        return jnp.stack([new_early, new_late], axis=1).reshape(x.shape)


def _start(piece: Int[Array, ""], devices: int, size: int) -> Array:
    """Where ``piece`` stands in a whole array in zigzag order."""
    return jnp.where(piece < devices, 2 * piece, 2 * (2 * devices - 1 - piece) + 1) * size
