"""Block sizes of the kernels: a table by chip, op, shape and dtype, ``tuning.json`` beside this file.

Which entry a call gets: of those for its op, dtype and chip (else the generic ones, whose chip is "tpu" or
"cuda") whose shape agrees in every axis it names but L, the ones that name most axes, and of these the one
whose L is nearest in ratio, the shorter of two equally near. Without one, the op's own default. The table is
read while a program is traced: a compiled function keeps the blocks it was compiled with.
``python -m benchmarks.tune`` fills it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import datetime
import functools
import json
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

PATH = pathlib.Path(__file__).with_name("tuning.json")
STATIC, MEASURED = "static cycles", "measured"
# The platform of each chip that entries may be for; the platforms themselves stand for any of their chips.
CHIPS = dict.fromkeys(("v4", "v5e", "v5p", "v6e", "v7x", "tpu"), "tpu")
CHIPS |= dict.fromkeys(("a100", "h100", "h200", "b200", "cuda"), "cuda")
# By a part of the device kind in lower case, the more particular first: v5e and v6e call themselves "lite",
# v5p plain "v5".
KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6": "v6e", "tpu7x": "v7x", "v4": "v4"}
KINDS |= {name: name for name in ("b200", "h200", "h100", "a100")}
logger = logging.getLogger("longspan.kernels")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        chip: of ``CHIPS``.
        shape: sizes by axis letter, as the op names them; an axis that is left out may have any size.
        dtype: of the matrix operands, as "bfloat16".
        blocks: block sizes, by the op's names for them.
        source: "static cycles" (the compiler's schedule, nothing was run) or "measured" (on that chip).
        date: when, as 2026-01-31.
        ms: what a call with these blocks took, by ``source``.
    """

    chip: str
    op: str
    shape: dict[str, int]
    dtype: str
    blocks: dict[str, int]
    source: str
    date: str
    ms: float | None = None

    @property
    def key(self) -> tuple:
        """What at most one entry of a table may be for."""
        return self.chip, self.op, tuple(sorted(self.shape.items())), self.dtype

    def __str__(self) -> str:
        shape = " ".join(f"{axis}={size}" for axis, size in self.shape.items())
        return f"{self.chip} {self.op} {self.dtype} {shape}".strip()


@dataclasses.dataclass(frozen=True)
class Question:
    """What a kernel asked :func:`blocks`."""

    op: str
    shape: dict[str, int]
    dtype: str
    default: dict[str, int]
    platform: str


_FIELDS = {field.name: field for field in dataclasses.fields(Entry)}
_chip: contextvars.ContextVar[str | None] = contextvars.ContextVar("chip", default=None)
_questions: contextvars.ContextVar[list[Question] | None] = contextvars.ContextVar("questions")
_forced: contextvars.ContextVar[Mapping[str, dict[str, int]]] = contextvars.ContextVar("forced")


def blocks(
    op: str, shape: Mapping[str, int], dtype: DTypeLike, default: Mapping[str, int], *, platform: str = "tpu"
) -> dict[str, int]:
    """The block sizes to use, with the keys of ``default``. The caller fits them to the length it has.

    Args:
        shape: sizes by axis letter, L among them if the op has a length.
        dtype: of the matrix operands.
        default: used where the table has nothing.
        platform: "tpu" or "cuda", what the kernel is for.

    Raises:
        ValueError: the table is broken, or its entry for this call names a block size that ``default`` lacks.
    """
    dtype = jnp.dtype(dtype).name
    if (questions := _questions.get(None)) is not None:
        questions.append(Question(op, dict(shape), dtype, dict(default), platform))
    if op in (given := _forced.get({})):
        return {**default, **given[op]}
    chip = current_chip()
    if chip is None or CHIPS[chip] != platform:
        chip = platform
    entry = find(table(), chip, op, shape, dtype) or find(table(), platform, op, shape, dtype)
    if entry is None:
        if chip != platform:
            _say_once(op, chip, str(dict(shape)), str(dict(default)))
        return dict(default)
    if unknown := sorted(set(entry.blocks) - set(default)):
        raise ValueError(
            f"{PATH.name}: the entry {entry} sets {unknown[0]!r}, which {op} does not have; "
            f"it has {', '.join(default)}."
        )
    return {**default, **entry.blocks}


def find(entries: Iterable[Entry], chip: str, op: str, shape: Mapping[str, int], dtype: str) -> Entry | None:
    """The entry for exactly this chip that a call gets, by the rule above; None if there is none."""
    length = shape.get("L", 1)

    def fits(entry: Entry) -> bool:
        named = entry.shape.items()
        same = all(shape.get(axis) == size for axis, size in named if axis != "L")
        return (entry.chip, entry.op, entry.dtype) == (chip, op, dtype) and same

    def rank(entry: Entry) -> tuple[int, float, int]:
        own = entry.shape.get("L", length)
        return -len(entry.shape), abs(math.log(own / length)), own

    return min(filter(fits, entries), key=rank, default=None)


@contextlib.contextmanager
def chip(name: str) -> Iterator[None]:
    """What is traced inside is for the chip ``name``: for compiling ahead of time.

    Raises:
        ValueError: an unknown chip.
    """
    if name not in CHIPS:
        raise ValueError(f"tuning: chip {name!r} is unknown; use one of {', '.join(CHIPS)}.")
    token = _chip.set(name)
    try:
        yield
    finally:
        _chip.reset(token)


@contextlib.contextmanager
def forced(op: str, sizes: Mapping[str, int]) -> Iterator[None]:
    """What is traced inside uses ``sizes`` for ``op``, whatever the table says."""
    token = _forced.set({**_forced.get({}), op: dict(sizes)})
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def questions() -> Iterator[list[Question]]:
    """What kernels traced inside ask for."""
    asked: list[Question] = []
    token = _questions.set(asked)
    try:
        yield asked
    finally:
        _questions.reset(token)


def current_chip() -> str | None:
    """That of the surrounding :func:`chip`, else of this process's devices; None where it is not known."""
    return _chip.get() or chip_of_kind(jax.local_devices()[0].device_kind)


def chip_of_kind(kind: str) -> str | None:
    """The chip of a ``device_kind``, None if it is not in the table of kinds."""
    return next((name for part, name in KINDS.items() if part in kind.lower()), None)


@functools.cache
def table() -> tuple[Entry, ...]:
    """The entries of ``PATH``, read once."""
    return read(PATH)


def read(path: pathlib.Path) -> tuple[Entry, ...]:
    """The entries of a file.

    Raises:
        ValueError: it is not JSON, or an entry is wrong; the message names it.
    """
    try:
        rows = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds {type(rows).__name__}; expected a list of entries.")
    entries = tuple(_entry(row, f"{path}: entry {number}") for number, row in enumerate(rows))
    seen: dict[tuple, int] = {}
    for number, entry in enumerate(entries):
        if seen.setdefault(entry.key, number) != number:
            raise ValueError(f"{path}: entries {seen[entry.key]} and {number} are both for {entry}.")
    return entries


def write(entries: Iterable[Entry], path: pathlib.Path) -> None:
    """One entry a line, sorted, so that a change shows as the lines it changes."""
    rows = []
    for entry in sorted(entries, key=lambda e: e.key):
        fields = {name: value for name, value in dataclasses.asdict(entry).items() if value is not None}
        rows.append(" " + json.dumps(fields))
    # Complete or not at all: a reader never finds half a table.
    partial = path.with_name(path.name + ".partial")
    partial.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    partial.replace(path)


def _entry(row: Any, where: str) -> Entry:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: is {row!r}; expected an object with the fields {', '.join(_FIELDS)}.")
    where += f" ({row.get('chip')} {row.get('op')} {row.get('dtype')} {row.get('shape')})"
    if unknown := sorted(set(row) - set(_FIELDS)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; expected {', '.join(_FIELDS)}.")
    required = [name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in row]:
        raise ValueError(f"{where}: the field {missing[0]!r} is missing.")
    for name, good, expected in (
        ("chip", row["chip"] in CHIPS, f"one of {', '.join(CHIPS)}"),
        ("op", isinstance(row["op"], str), "the name of an op"),
        ("dtype", isinstance(row["dtype"], str), 'the name of a dtype, as "bfloat16"'),
        ("shape", _sizes(row["shape"]), "positive whole numbers by axis letter"),
        ("blocks", _sizes(row["blocks"]) and row["blocks"], "positive whole numbers by name"),
        ("source", row["source"] in (STATIC, MEASURED), f"{STATIC!r} or {MEASURED!r}"),
        ("date", _is_date(row["date"]), "a date, as 2026-01-31"),
        ("ms", isinstance(row.get("ms", 0), int | float), "milliseconds"),
    ):
        if not good:
            raise ValueError(f"{where}: {name} is {row[name]!r}; expected {expected}.")
    return Entry(**row)


def _sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(type(size) is int and size > 0 for size in value.values())


def _is_date(value: Any) -> bool:
    try:
        return bool(datetime.date.fromisoformat(value))
    except (TypeError, ValueError):
        return False


@functools.cache
def _say_once(op: str, chip: str, shape: str, default: str) -> None:
    logger.info(
        "%s: no tuned block sizes for %s at %s, so the default %s is used; "
        "'python -m benchmarks.tune --ops=%s' measures them.",
        *(op, chip, shape, default, op),
    )
