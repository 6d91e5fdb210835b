"""Cross entropy on hidden states, so that [B, L, V] logits never exist at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.types import State
from models.lm import LM
from pallas_kernels import spmd, time_order

LOGIT_BYTES = 64 * 2**20  # automatic chunks keep a device's block of float32 logits below this


def token_nll(
    lm: LM,
    batch: Mapping[str, Array],
    state: State | None = None,
    chunks: int = 0,
    sequence_layout: str = "contiguous",
) -> tuple[Float[Array, "B L"], Float[Array, "B L"], State | None]:
    """Nats and log-normaliser of every target of a token batch, float32, and the state carried on.

    Args:
        batch: ``tokens``, ``targets``, ``segment_ids`` and ``positions``, int32 [B, L]; and ``prefix``, bool,
            where some tokens may be read both ways (``layers.types.Context``).
        state: what the rows continue; None for nothing, and then none is returned.
        chunks: as for :func:`chunked_cross_entropy`.
        sequence_layout: order to compute in, as for the model. What is returned is in the order of time.
    """
    _, state, out = lm(
        batch["tokens"],
        state,
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        sequence_layout=sequence_layout,
        **({"prefix": batch["prefix"]} if "prefix" in batch else {}),
    )
    layout = time_order.usable(sequence_layout, batch["targets"].shape[1])
    targets = time_order.arrange_sharded(batch["targets"], layout)
    losses = chunked_cross_entropy(lm, out["arranged"], targets, chunks)
    nll, log_z = (time_order.restore_sharded(loss, layout) for loss in losses)
    return nll, log_z, state


def chunked_cross_entropy(
    lm: LM, hidden: Float[Array, "B L D"], targets: Int[Array, "B L"], chunks: int = 0
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Negative log-likelihood in nats and log-normaliser of each target, float32.

    Args:
        chunks: pieces of L to go through one after another, recomputing logits in the backward pass;
            0 takes the fewest that divide L and keep a device's piece of logits below 64 MiB. On a mesh
            every piece costs a sum of the head's gradient over the devices.

    Raises:
        ValueError: ``chunks`` does not divide L.
    """
    nll, log_z = _in_pieces(_cross_entropy, lm, hidden, targets, chunks)
    return nll, log_z


def chunked_hits(
    lm: LM, hidden: Float[Array, "B L D"], targets: Int[Array, "B L"], chunks: int = 0
) -> Bool[Array, "B L"]:
    """Whether each target is the most likely token; arguments as for :func:`chunked_cross_entropy`."""
    return _in_pieces(_hits, lm, hidden, targets, chunks)[0]


def _in_pieces(
    fn: Callable[..., tuple[jax.Array, ...]], lm: LM, hidden: jax.Array, targets: jax.Array, chunks: int
) -> tuple[jax.Array, ...]:
    """``fn(lm, hidden, targets)``, arrays [B, L], of some of the tokens at a time."""
    batch, length, _ = hidden.shape
    if chunks == 0:
        here = length // _parts(spmd.SEQUENCE, length)
        rows = batch // _parts(spmd.BATCH, batch)
        columns = lm.config.padded_vocab_size // _parts(spmd.TENSOR, lm.config.padded_vocab_size)
        divisors = (n for n in range(1, here + 1) if here % n == 0)
        chunks = next(n for n in divisors if rows * here * columns * 4 // n <= LOGIT_BYTES or n == here)
    if length % chunks:
        raise ValueError(f"model.loss_chunks={chunks} does not divide the sequence length {length}")
    if chunks == 1:
        return fn(lm, hidden, targets)

    # Piece j takes tokens j, j + chunks, ...: the major part of a sharded time axis stays where it is.
    def split(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(batch, length // chunks, chunks, *a.shape[2:]), 2, 0)

    body = jax.checkpoint(fn, prevent_cse=False)
    _, pieces = jax.lax.scan(lambda _, piece: (None, body(lm, *piece)), None, (split(hidden), split(targets)))
    return tuple(jnp.moveaxis(a, 0, 2).reshape(batch, length) for a in pieces)


def _parts(names: str | tuple[str, ...], size: int) -> int:
    """Devices that a dimension is split over along mesh axes."""
    mesh = spmd.active_mesh()
    axes = None if mesh is None else spmd.axes_dividing(mesh, names, size)
    if mesh is None or axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _hits(lm: LM, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array]:
    return (jnp.argmax(lm.logits(hidden), axis=-1) == targets,)


def _cross_entropy(lm: LM, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = lm.logits(hidden)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - picked, log_z
