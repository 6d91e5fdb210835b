"""Snakes: chains of dashes that cross neither themselves nor each other, grown in many images at once.

A snake goes on from its last dash at a pivot a little ahead of it: the head of the next dash is a free point
of the ring around the pivot, likelier the straighter on. A dash takes space, but only once the snake has
another, so that dashes of one snake may touch. A snake that cannot go on is given up at once.

Sampling is by rejection: two contours are tried again and again until both have all their dashes. Attempt a
at image i is a pure function of (seed, i, a), and the first that succeeds is taken, so that images do not
depend on what else is made with them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from tasks.lra.pathfinder.space import Segment, Space
from tasks.lra.pathfinder.spec import PathfinderSpec
from tasks.lra.pathfinder.stamps import DEGREES, FREE, Stamps, dilate, first_ends, move

DRAWS = 3  # of a dash, before a snake is given up
DISTRACTOR_TRIES = 5
FEWEST_FREE = 0.01  # share of the pixels below which no distractor is started
MOST_ATTEMPTS = 300_000
MEMORY = 1 << 25  # bytes of the spaces of all attempts at once


def uniforms(
    seed: int, indices: Int[np.ndarray, " a"], streams: Int[np.ndarray, " a"], count: int
) -> Float[np.ndarray, "a count"]:
    """Numbers in [0, 1); each row is a pure function of the seed, an image's index and one of its streams:
    0 for the image as a whole, n for its n-th attempt."""
    result = np.empty((len(indices), count))
    for row, index, stream in zip(result, indices.tolist(), streams.tolist()):
        key = np.array([seed % 2**64, index], np.uint64)
        counter = np.array([0, 0, 0, stream], np.uint64)
        np.random.Generator(np.random.Philox(key=key, counter=counter)).random(out=row)
    return result


@dataclasses.dataclass
class Snake:
    """The end of one snake in each of several images: its last dash, and the pivot of that."""

    dash: Segment
    pivot: Int[np.ndarray, "a 2"]

    def select(self, which: np.ndarray) -> Snake:
        """Of the images ``which``."""
        return Snake(self.dash[which], self.pivot[which])


def extend(
    space: Space, rows: Int[np.ndarray, " a"], snake: Snake, draws: Float[np.ndarray, "a 3"]
) -> tuple[Bool[np.ndarray, " a"], Snake]:
    """Give each snake another dash, and its last one the space it takes.

    Returns:
        Which of them could go on, and these.
    """
    table = space.table
    pivot = move(snake.pivot, table.step[snake.dash[:, 0]])
    points = pivot[:, None] + table.ring + table.pad
    free = 255 - space.blocked[rows[:, None], points[..., 0], points[..., 1]]
    cumulative = np.cumsum(table.odds[snake.dash[:, 0]] * free, 1)
    total = cumulative[:, -1]
    dash = np.zeros_like(snake.dash)
    found = np.zeros(len(rows), bool)
    todo = np.flatnonzero(total >= 1e-4 * 255)
    for draw in range(DRAWS):
        point = (cumulative[todo] <= draws[todo, draw, None] * total[todo, None]).sum(1)
        dash[todo, 0] = DEGREES + point
        dash[todo, 1:] = pivot[todo] + table.ring[point]
        collides = space.collides(rows[todo], dash[todo])
        found[todo[~collides]] = True
        todo = todo[collides]
        if not len(todo):
            break
    space.take(rows[found], snake.dash[found])
    return found, Snake(dash[found], pivot[found])


def contours(
    spec: PathfinderSpec, table: Stamps, seed: int, indices: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, "n 2 c 3"], Space]:
    """The two contours of each image, and the space they take.

    Raises:
        ValueError: no attempt succeeds.
    """
    result = np.zeros((len(indices), 2, spec.contour_length, 3), int)
    kept = Space(spec, table, len(indices))
    lanes = lanes_at_once(spec, table)
    space = Space(spec, table, lanes)
    attempted, most = np.zeros(len(indices), int), 4
    pending = np.arange(len(indices))
    numbers = 8 + 2 * (spec.contour_length - 1) * DRAWS
    while len(pending):
        group = pending[:lanes]
        times = min(lanes // len(group), most)
        attempts = attempted[group, None] + 1 + np.arange(times)
        if attempts.max() > MOST_ATTEMPTS:
            raise ValueError(
                f"{spec}: no two contours fit in {MOST_ATTEMPTS} attempts at image {indices[group[0]]}; "
                f"contour_length={spec.contour_length} is too long"
            )
        draws = uniforms(seed, np.repeat(indices[group], times), attempts.reshape(-1), numbers)
        lane, snakes = _attempt(spec, space, draws)
        image, first = np.unique(np.repeat(group, times)[lane], return_index=True)
        result[image] = snakes[first]
        kept.mask[image], kept.blocked[image] = space.mask[lane[first]], space.blocked[lane[first]]
        attempted[group] += times
        most *= 2
        pending = np.setdiff1d(pending, image)
    kept.take(np.arange(len(indices)), result[:, 1, -1])  # but not the first snake's last: as in the original
    return result, kept


def lanes_at_once(spec: PathfinderSpec, table: Stamps) -> int:
    """Attempts that are made at once."""
    return max(16, MEMORY // (2 * (spec.resolution + 2 * table.pad) ** 2))


def _attempt(
    spec: PathfinderSpec, space: Space, draws: Float[np.ndarray, "A U"]
) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, "a 2 c 3"]]:
    """An attempt in every row of ``space``: which of them succeed, in order, and their snakes."""
    space.clear(len(draws))
    result = np.zeros((len(draws), 2, spec.contour_length, 3), int)
    rows, snakes = _seeds(spec, space.table, draws[:, :8])
    for number, snake in enumerate(snakes):
        result[rows, number, 0] = snake.dash
    steps = draws[:, 8:].reshape(len(draws), spec.contour_length - 1, 2, DRAWS)
    for step in range(spec.contour_length - 1):
        for number in range(2):
            found, grown = extend(space, rows, snakes[number], steps[rows, step, number])
            rows = rows[found]
            result[rows, number, step + 1] = grown.dash
            snakes = [grown if i == number else snake.select(found) for i, snake in enumerate(snakes)]
    return rows, result[rows]


def _seeds(
    spec: PathfinderSpec, table: Stamps, draws: Float[np.ndarray, "A 8"]
) -> tuple[Int[np.ndarray, " a"], list[Snake]]:
    """First dashes of both snakes: the first snake's near the middle, the second's at a distance from it."""
    choice = (draws[:, 0] * len(table.first_angles)).astype(int)
    sides = table.first_sides[choice]
    number = (draws[:, 1] * sides.prod(1)).astype(int)
    tail = table.first_low[choice] + np.stack(np.divmod(number, sides[:, 1]), 1)
    first = _start(table, table.first_angles[choice], tail)
    angles = (draws[:, 2:5] * DEGREES).astype(int)
    around = np.radians((draws[:, 5:8] * DEGREES).astype(int))
    away = spec.geometry.seed_distance * np.stack([np.sin(around), np.cos(around)], -1)
    tails = np.rint(tail[:, None] + away).astype(int)
    ends = first_ends(table, angles, tails)
    whole = np.all((ends >= 0) & (ends < spec.resolution), axis=(2, 3))
    rows, which = np.flatnonzero(np.any(whole, axis=1)), np.argmax(whole, axis=1)
    second = _start(table, angles[rows, which[rows]], tails[rows, which[rows]])
    return rows, [first.select(rows), second]


def _start(table: Stamps, angle: Int[np.ndarray, " a"], tail: Int[np.ndarray, "a 2"]) -> Snake:
    return Snake(np.column_stack([angle, tail]), first_ends(table, angle, tail)[:, 1])


def distractors(
    spec: PathfinderSpec, space: Space, draws: Float[np.ndarray, "n D 5 U"]
) -> tuple[Int[np.ndarray, "n D d 3"], Bool[np.ndarray, "n D"]]:
    """Short snakes in the space that is left, and which of them found a place."""
    images, count = draws.shape[:2]
    result = np.zeros((images, count, spec.distractor_length, 3), int)
    made = np.zeros((images, count), bool)
    for number in range(count):
        for attempt in range(DISTRACTOR_TRIES):
            todo = np.flatnonzero(~made[:, number])
            rows, snakes = _distractor(spec, space, todo, draws[todo, number, attempt])
            result[rows, number] = snakes
            made[rows, number] = True
    return result, made


def distractor_draws(spec: PathfinderSpec) -> tuple[int, int, int]:
    """The shape of ``draws`` of `distractors`, for one image."""
    return spec.distractors, DISTRACTOR_TRIES, 2 * DRAWS + (spec.distractor_length - 1) * DRAWS


def _distractor(
    spec: PathfinderSpec, space: Space, rows: Int[np.ndarray, " a"], draws: Float[np.ndarray, "a U"]
) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, "b d 3"]]:
    """One more snake in each of the rows: where this succeeded, and the snakes. The others are left alone."""
    seeds = [_distractor_seed(space, row, u) for row, u in zip(rows.tolist(), draws[:, : 2 * DRAWS].tolist())]
    place = np.flatnonzero([seed is not None for seed in seeds])
    started = np.array([seed for seed in seeds if seed is not None], int).reshape(-1, 3)
    snake = _start(space.table, started[:, 0], started[:, 1:])
    tried, before = rows[place], (space.mask[rows[place]], space.blocked[rows[place]])
    result = np.zeros((len(rows), spec.distractor_length, 3), int)
    result[place, 0] = snake.dash
    steps = draws[:, 2 * DRAWS :].reshape(len(rows), spec.distractor_length - 1, DRAWS)
    for step in range(spec.distractor_length - 1):
        found, snake = extend(space, rows[place], snake, steps[place, step])
        place = place[found]
        result[place, step + 1] = snake.dash
    space.take(rows[place], snake.dash)
    failed = ~np.isin(tried, rows[place])
    space.mask[tried[failed]], space.blocked[tried[failed]] = (array[failed] for array in before)
    return rows[place], result[place]


def _distractor_seed(space: Space, row: int, draws: list[float]) -> tuple[int, int, int] | None:
    """Angle and tail of a first dash anywhere in an image, or None if it finds no place."""
    table = space.table
    inner = slice(table.pad, table.pad + space.size)
    taken = space.mask[row, inner, inner] > FREE
    if 1 - taken.mean() < FEWEST_FREE:
        return None
    for turn, place in zip(draws[:DRAWS], draws[DRAWS:]):
        angle = int(turn * DEGREES)
        footprint = table.footprints[angle]
        tails = np.argwhere(~dilate(taken, footprint)) if len(footprint) else ()
        if not len(tails):
            return None
        tail = tails[int(place * len(tails))]
        ends = first_ends(table, np.array(angle), tail)
        if ((ends >= 0) & (ends < space.size)).all():
            return angle, int(tail[0]), int(tail[1])
    return None
