"""Rows of documents cut into segments: which token is read in which step, and where in its segment it stands.

A segment is S tokens of one document, counted from its start; the last of a document may be shorter. A step
reads what a row has of its next segment. Rows are out of phase with each other: documents start anywhere, and
a piece may begin within a segment whose first tokens were in the piece before.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.types import canonical_segments, positions_in_segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """The cut of a piece.

    Attributes:
        step: in which step a token is read, counted from 0 in each row; -1 for padding. int32 [B, L].
        phase: place of a token in its segment, int32 [B, L].
        fresh: whether a document begins with this token, other than the one under way, bool [B, L].
        count: steps of each row, int32 [B].
        document: raw id of the last real token so far, int32 [B].
        end: how many tokens of the segment then under way are read, int32 [B].
        size: S (static).
    """

    step: Int[Array, "B L"]
    phase: Int[Array, "B L"]
    fresh: Bool[Array, "B L"]
    count: Int[Array, " B"]
    document: Int[Array, " B"]
    end: Int[Array, " B"]
    size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """What one step reads of one segment in each row (or each of N steps).

    Attributes:
        tokens: the first ``count`` count, int32 [B, W].
        start: where they stand in the piece, int32 [B].
        count: 0 for a row that has nothing to read in this step, int32 [B].
        phase: place of the first in its segment, int32 [B].
        opens: the segment begins with them, bool [B].
        closes: it is full with them, bool [B].
        fresh: they begin a document, bool [B].
    """

    tokens: Int[Array, "*N B W"]
    start: Int[Array, "*N B"]
    count: Int[Array, "*N B"]
    phase: Int[Array, "*N B"]
    opens: Bool[Array, "*N B"]
    closes: Bool[Array, "*N B"]
    fresh: Bool[Array, "*N B"]


def cut(
    segment_ids: Int[Array, "B L"], previous: Int[Array, " B"], phase: Int[Array, " B"], size: int
) -> Segments:
    """Cut a piece into segments.

    Args:
        segment_ids: raw ids of documents, 0 for padding.
        previous: the id of the last real token before; 0 for nothing before.
        phase: how many tokens of the segment under way were read before.
        size: S.
    """
    runs, _ = canonical_segments(segment_ids, previous)
    real = runs != 0
    position = positions_in_segments(runs, phase - 1)
    place = position % size
    begins = real & ((place == 0) | (jnp.cumsum(real, axis=1) == 1))
    step = jnp.where(real, jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1, -1)
    some, last = real.any(axis=1), runs == runs.max(axis=1, keepdims=True)
    of_last = lambda values: jnp.where(last, values, 0).max(axis=1)  # noqa: E731
    return Segments(
        step=step,
        phase=place,
        fresh=(runs > 1) & (position == 0),
        count=begins.sum(axis=1, dtype=jnp.int32),
        document=jnp.where(some, of_last(segment_ids), previous),
        end=jnp.where(some, (of_last(position) + 1) % size, phase),
        size=size,
    )


def part(segments: Segments, tokens: Int[Array, "B L"], step: Int[Array, ""] | int, width: int) -> Part:
    """What ``step`` reads, in ``width`` columns; min(S, L) of them hold it all."""
    here = segments.step == step
    count, start = here.sum(axis=1, dtype=jnp.int32), jnp.argmax(here, axis=1).astype(jnp.int32)
    index = jnp.minimum(start[:, None] + jnp.arange(width), tokens.shape[1] - 1)
    first = lambda values: jnp.take_along_axis(values, start[:, None], axis=1)[:, 0]  # noqa: E731
    phase, some = first(segments.phase), count > 0
    return Part(
        tokens=jnp.take_along_axis(tokens, index, axis=1),
        start=start,
        count=count,
        phase=phase,
        opens=some & (phase == 0),
        closes=some & (phase + count == segments.size),
        fresh=some & first(segments.fresh),
    )


def remember(recent: Int[Array, "B R"], read: Part) -> Int[Array, "B R"]:
    """The last R ids read, after ``read``."""
    both = jnp.concatenate([recent, read.tokens], axis=1)
    return jnp.take_along_axis(both, read.count[:, None] + jnp.arange(recent.shape[1]), axis=1)


def scatter(into: Float[Array, "B L D"], values: Float[Array, "B W D"], read: Part) -> Float[Array, "B L D"]:
    """``into`` with ``values`` in place of the tokens that were read."""
    place = jnp.arange(values.shape[1])
    index = jnp.where(place < read.count[:, None], read.start[:, None] + place, into.shape[1])
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(into, index, values)


def gather(values: Float[Array, "N B S D"], segments: Segments) -> Float[Array, "B L D"]:
    """What N steps, each of a segment from its start, gave for every token; anything for those not read."""
    steps, batch, size, features = values.shape
    index = jnp.clip(segments.step, 0, steps - 1) * size + segments.phase
    by_row = jnp.moveaxis(values, 0, 1).reshape(batch, steps * size, features)
    return jax.vmap(lambda row, at: row[at])(by_row, jnp.minimum(index, steps * size - 1))
