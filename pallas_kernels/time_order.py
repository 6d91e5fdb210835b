"""The order in which tokens lie along a sharded time axis.

Time is cut into pieces of equal length, and each of the n devices of the sequence axis holds one or two:

* ``"contiguous"``: n pieces, device i holds piece i.
* ``"zigzag"``: 2n pieces, device i holds pieces i and 2n-1-i, in this order. Under a causal mask a late query
  sees many keys and an early one few; a device that holds one of each has as much to do as every other, at
  every step of the attention ring, where contiguous pieces leave half of the devices waiting.

The model computes in one order from the embedding to the loss: recurrences and convolutions work on any
assignment of pieces to devices, since all they exchange is the summary of a piece and its last rows. The
alternative, recurrences in contiguous order and q, k, v and the output of every attention layer sent to
zigzag order and back, moves activations: with d_model 2560, eight devices and bfloat16 up to 84 MB a device
and attention layer at L = 32K, 2.7 GB at L = 1M, and again in the backward, in four permutes that nothing
hides. Zigzag order throughout costs a Mamba-2 layer of that width (H 80, P 64, N 128, 2.6 MB a summary) n
more summaries in its one gather, 21 MB at any length, and its convolution a second permute of K-1 rows. With
six such layers to one of attention the two break even near L = 50K; sequences are sharded for being longer.

Like the mesh, the order says where arrays live and not what an op computes, and an op finds it as it finds
the mesh. Whoever sets it (``models.backbone``) has arranged the arrays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Int, Shaped

from pallas_kernels import spmd

CONTIGUOUS, ZIGZAG = ORDERS = ("contiguous", "zigzag")

_in_force = jax.make_user_context(CONTIGUOUS)  # part of the key of jax's caches, as the mesh is


@contextlib.contextmanager
def use(order: str) -> Iterator[None]:
    """Ops called in this context take and give arrays in ``order``. Raises ValueError for an unknown one."""
    if order not in ORDERS:
        raise ValueError(f"sequence_layout={order!r} is unknown; use one of {ORDERS}.")
    with _in_force(order):
        yield


def usable(order: str, length: int) -> str:
    """``order`` if the active mesh can hold ``length`` tokens in it, else "contiguous".

    That is without sharded time, where there is no difference, and for lengths such as a decoded token's.
    """
    parts = spmd.sequence_parts()
    return order if parts > 1 and length % (pieces_of(order) * parts) == 0 else CONTIGUOUS


def pieces_of(order: str) -> int:
    """Pieces of time on each device."""
    return 2 if order == ZIGZAG else 1


def shard(op: str, mesh: AbstractMesh, length: int) -> tuple[str | None, int]:
    """The mesh axis that splits ``length`` tokens (None: they are whole everywhere), and pieces on a device.

    Raises:
        ValueError: zigzag order is in force and its pieces do not divide the length.
    """
    parts = mesh.shape.get(spmd.SEQUENCE, 1)
    pieces = pieces_of(_in_force.value) if parts > 1 else 1
    if pieces > 1 and length % (pieces * parts):
        raise ValueError(
            f"{op}: {length} tokens in zigzag order over mesh.sequence={parts} devices; the length must be a "
            f"multiple of {pieces * parts}. Pad it, or compute it in contiguous order."
        )
    time = spmd.axes_dividing(mesh, spmd.SEQUENCE, length)
    assert not isinstance(time, tuple)
    return time, pieces


# Inside a shard_map over the sequence axis.


def split(x: Shaped[Array, "B L *d"] | None, pieces: int) -> Shaped[Array, "rows piece *d"] | None:
    """Each piece that this device holds as a row of its own: row b * pieces + j is piece j of row b."""
    if x is None or pieces == 1:
        return x
    return x.reshape(x.shape[0] * pieces, x.shape[1] // pieces, *x.shape[2:])


def join(x: Shaped[Array, "rows piece *d"], pieces: int) -> Shaped[Array, "B L *d"]:
    """Inverse of :func:`split`."""
    if pieces == 1:
        return x
    return x.reshape(x.shape[0] // pieces, x.shape[1] * pieces, *x.shape[2:])


def numbers(device: Array | int, parts: int, pieces: int) -> Int[Array, " pieces"]:
    """Where in time the pieces of ``device`` stand, counted from 0."""
    first = jnp.asarray(device, jnp.int32)
    return jnp.stack([first, 2 * parts - 1 - first]) if pieces == 2 else first[None]


def in_time(gathered: Shaped[Array, "n B pieces *d"]) -> Shaped[Array, "n*pieces B *d"]:
    """What was gathered of every device's pieces, in the order of time."""
    early, *late = jnp.moveaxis(gathered, 2, 0)
    return jnp.concatenate([early, late[0][::-1]]) if late else early


def from_previous(x: Shaped[Array, "B pieces *d"]) -> Shaped[Array, "B pieces *d"]:
    """What the piece before each has; zeros for the first of all. One permute a piece."""
    parts, here = jax.lax.axis_size(spmd.SEQUENCE), jax.lax.axis_index(spmd.SEQUENCE)
    rightward = [(i, i + 1) for i in range(parts - 1)]
    early = jax.lax.ppermute(x[:, 0], spmd.SEQUENCE, rightward)
    if x.shape[1] == 1:
        return early[:, None]
    late = jax.lax.ppermute(x[:, 1], spmd.SEQUENCE, [(b, a) for a, b in rightward])
    late = jnp.where(here == parts - 1, x[:, 0], late)  # time turns round on the last device
    return jnp.stack([early, late], axis=1)


def row_index(device: Array | int, length: int, parts: int, pieces: int) -> Int[Array, " L"]:
    """Index in time of each of the ``length`` tokens that ``device`` holds."""
    size = length // pieces
    starts = numbers(device, parts, pieces) * size
    return (starts[:, None] + jnp.arange(size, dtype=jnp.int32)).reshape(length)


# On whole arrays [B, L, ...], outside.


def positions(length: int) -> Int[np.ndarray, " L"]:
    """Index in time of each token of an array in the order in force."""
    index = np.arange(length, dtype=np.int32)
    parts = spmd.sequence_parts()
    return index if parts == 1 or _in_force.value == CONTIGUOUS else _zigzag(index[None], parts, np)[0]


def arrange(x: Shaped[Array, "B L *d"], order: str, parts: int | None = None) -> Shaped[Array, "B L *d"]:
    """``x`` in the order of time, put into ``order``. For arrays that are whole along time on every device.

    Args:
        parts: devices of the sequence axis, None to ask the active mesh.
    """
    parts = spmd.sequence_parts() if parts is None else parts
    return x if order == CONTIGUOUS or parts == 1 else _zigzag(x, parts, jnp)


def restore(x: Shaped[Array, "B L *d"], order: str, parts: int | None = None) -> Shaped[Array, "B L *d"]:
    """Inverse of :func:`arrange`."""
    parts = spmd.sequence_parts() if parts is None else parts
    if order == CONTIGUOUS or parts == 1:
        return x
    by_device = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
    in_time = jnp.concatenate([by_device[:, :, 0], by_device[:, ::-1, 1]], axis=1)
    return in_time.reshape(x.shape)


def _zigzag(x, parts: int, xp):
    in_time = x.reshape(x.shape[0], 2 * parts, -1, *x.shape[2:])
    return xp.stack([in_time[:, :parts], in_time[:, : parts - 1 : -1]], axis=2).reshape(x.shape)


def reverse(x: Shaped[Array, "B L *d"], order: str) -> Shaped[Array, "B L *d"]:
    """Tokens last first, in ``order`` before and after; in zigzag order no token leaves its device."""
    if order == CONTIGUOUS:
        return x[:, ::-1]
    return x.reshape(x.shape[0], spmd.sequence_parts(), -1, *x.shape[2:])[:, :, ::-1].reshape(x.shape)


def arrange_sharded(x: Shaped[Array, "B L *d"], order: str) -> Shaped[Array, "B L *d"]:
    """:func:`arrange` of an array whose time axis is sharded: two permutes, each of half of it."""
    return _exchange(x, order, inverse=False)


def restore_sharded(x: Shaped[Array, "B L *d"], order: str) -> Shaped[Array, "B L *d"]:
    """Inverse of :func:`arrange_sharded`."""
    return _exchange(x, order, inverse=True)


def _exchange(x, order: str, inverse: bool):
    """A device holds one even and one odd piece of 2n in either order, so each parity is a permutation."""
    mesh = spmd.active_mesh()
    if mesh is None or order == CONTIGUOUS or spmd.sequence_parts() == 1:
        return x
    parts = spmd.sequence_parts()
    spec = PartitionSpec(spmd.axes_dividing(mesh, spmd.BATCH, x.shape[0]), spmd.SEQUENCE)
    zigzag = [min(piece, 2 * parts - 1 - piece) for piece in range(2 * parts)]  # holder of each piece
    pairs = [[(piece // 2, zigzag[piece]) for piece in range(parity, 2 * parts, 2)] for parity in (0, 1)]
    if inverse:
        pairs = [[(b, a) for a, b in parity] for parity in pairs]

    def device(x):
        # In time order the even piece stands first. In zigzag order device i has piece i first.
        flip = jax.lax.axis_index(spmd.SEQUENCE) % 2 == 1
        first, second = jnp.split(x, 2, axis=1)
        if inverse:
            first, second = jnp.where(flip, second, first), jnp.where(flip, first, second)
        first, second = (jax.lax.ppermute(t, spmd.SEQUENCE, p) for t, p in zip((first, second), pairs))
        if not inverse:
            first, second = jnp.where(flip, second, first), jnp.where(flip, first, second)
        return jnp.concatenate([first, second], axis=1)

    return jax.shard_map(device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)
