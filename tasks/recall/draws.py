"""Random numbers of a row that depend on the row's number alone, and what is drawn with them.

Philox counts: row r of a stream owns the counters ``r * width / 4 ...``, so that any rows can be made without
those before them, and a block of rows is drawn by one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

PER_COUNTER = 4  # 64-bit numbers that Philox makes of one counter


def uniforms(
    stream: Sequence[int], rows: Int[np.ndarray, " n"], width: int
) -> Float[np.ndarray, "n {width}"]:
    """``width`` numbers in [0, 1) for each of ``rows`` (their numbers, >= 0) of the stream."""
    key = np.random.SeedSequence(tuple(stream)).generate_state(2, np.uint64)
    padded = -(-width // PER_COUNTER) * PER_COUNTER
    found = np.empty((len(rows), padded))
    begins = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
    for begin, end in zip(begins, [*begins[1:], len(rows)]):  # runs of consecutive rows
        bits = np.random.Philox(key=key)
        bits.advance(int(rows[begin]) * padded // PER_COUNTER)
        np.random.Generator(bits).random(out=found[begin:end])
    return found[:, :width]


def split(u: Float[np.ndarray, "n w"], *widths: int) -> list[Float[np.ndarray, "n _"]]:
    """``u`` cut into columns of these widths, which add up to w."""
    assert sum(widths) == u.shape[1]
    return np.split(u, np.cumsum(widths)[:-1], axis=1)


def integers(
    u: Float[np.ndarray, "*b"], low: int | np.ndarray, high: int | np.ndarray
) -> Int[np.ndarray, "*b"]:
    """Uniform in low..high - 1."""
    return (low + np.floor(u * (np.asarray(high) - low))).astype(np.int64)


def distinct(u: Float[np.ndarray, "n k"], population: int) -> Int[np.ndarray, "n k"]:
    """k of 0..population - 1 in random order without repetition: the first steps of Fisher and Yates."""
    count, k = u.shape
    pool = np.tile(np.arange(population, dtype=np.int32), (count, 1))
    row, found = np.arange(count), np.empty((count, k), np.int64)
    for j in range(k):
        place = integers(u[:, j], j, population)
        found[:, j] = pool[row, place]
        pool[row, place] = pool[:, j]
    return found


def weighted_order(
    u: Float[np.ndarray, "n m"], weights: Float[np.ndarray, " m"], k: int
) -> Int[np.ndarray, "n k"]:
    """k of 0..m - 1 without repetition, one after the other with probability proportional to ``weights``.

    The order in which independent Poisson processes with these rates first fire.
    """
    return np.argsort(-np.log1p(-u) / weights, axis=1)[:, :k]


def set_apart(
    strings: Int[np.ndarray, "*b"],
    last: Int[np.ndarray, "*c"],
    u: Float[np.ndarray, "*c"],
    letters: int,
    held_out: bool,
) -> None:
    """Change the last letters, in place, so that held-out strings are never training strings.

    Letters 0..letters - 1 of a held-out string add up to a multiple of ``letters``, those of a training
    string never do; among its own kind every string is as likely as any other.

    Args:
        strings: [..., m], uniform letters; the letters after the last do not count.
        last: index of the last letter of each string, [...].
    """
    index = last[..., None]
    before = np.where(np.arange(strings.shape[-1]) < index, strings, 0).sum(-1)
    total = np.zeros_like(last) if held_out else integers(u, 1, letters)
    np.put_along_axis(strings, index, ((total - before) % letters)[..., None], axis=-1)
