"""The TPU topologies that the compiler describes, and what a device of each has."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from runtime import aot

GIB = 2**30


class TopologyError(ValueError):
    """There is no such topology."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU, by the name that topologies of it begin with.

    Attributes:
        hbm: bytes of main memory that a program can have on one device, as libtpu 0.0.42 states them when it
            refuses a program ("exceeds available HBM"); what the data sheet promises is a little more.
        devices: that jax sees for one chip. On v4 each of the two cores is one.
        link: bytes/s that a chip exchanges with its neighbours, all of them together (data sheets).
        shapes: of slices, as in "v5e:4x4", the smallest first: those that can be rented, which the compiler
            describes. It describes others of the same form too.
    """

    hbm: int
    devices: int
    link: float
    shapes: tuple[str, ...]


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
CHIPS = {
    "v5e": Chip(int(15.75 * GIB), 1, 200e9, _FLAT),
    "v5p": Chip(int(95.74 * GIB), 1, 600e9, (*_CUBES, "16x16x24")),
    "v6e": Chip(int(31.25 * GIB), 1, 400e9, _FLAT),
    "v4": Chip(int(15.25 * GIB), 2, 300e9, _CUBES),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described slice. ``kind`` is the devices' own name, ``chip`` an entry of ``CHIPS``."""

    name: str
    kind: str
    chip: Chip
    devices: tuple[Any, ...]


def describe(name: str) -> Topology:
    """The topology called "CHIP:SHAPE", as in "v5e:16x16" or "v5p:4x4x8".

    Raises:
        TopologyError: the compiler describes none of that name; the message lists what there is.
        RuntimeError: libtpu is not installed.
    """
    if reason := aot.unavailable():
        raise RuntimeError(f"--topology={name}: {reason}")
    chip, _, shape = name.partition(":")
    if chip not in CHIPS:
        close = difflib.get_close_matches(chip, CHIPS, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise TopologyError(f"--topology={name}: there is no chip {chip!r}{meant} Known are:\n{known()}")
    try:
        devices: tuple[Any, ...] = tuple(aot.topology(name).devices)
    except RuntimeError as error:
        raise TopologyError(
            f"--topology={name}: the compiler describes no slice {shape!r} of {chip}, whose hosts have 2x2 "
            f"chips. Known are:\n{known()}"
        ) from error
    return Topology(name, devices[0].device_kind, CHIPS[chip], devices)


def known() -> str:
    """Every topology of ``CHIPS``, a line a chip."""
    return "\n".join(
        "  " + " ".join(f"{name}:{shape}" for shape in chip.shapes) for name, chip in CHIPS.items()
    )
