"""What a chip can do at best, and the bound that this puts on a piece of work."""

from __future__ import annotations

import dataclasses

from pallas_kernels.tuning import chip_of_kind


@dataclasses.dataclass(frozen=True)
class Peak:
    """Dense matmul FLOP/s and bytes/s to memory of one chip."""

    flops: float
    bytes: float

    def bound(self, work: Work) -> Bound:
        """The time that ``work`` takes at least."""
        compute, memory = work.flops / self.flops, work.bytes / self.bytes
        return Bound(max(compute, memory), "memory" if memory >= compute else "compute")


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating point operations (a multiply-add is two), and bytes that must pass to or from memory."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds, and whether "memory" or "compute" sets them."""

    seconds: float
    by: str


# bfloat16, from the makers' data sheets. float32 products are slower, scans and exponentials have no part in
# matrix units: the bound stays one, but less of it can be reached.
PEAKS = {
    "v5e": Peak(197e12, 0.819e12),
    "v5p": Peak(459e12, 2.765e12),
    "v6e": Peak(918e12, 1.64e12),
    "h100": Peak(989e12, 3.35e12),
    "h200": Peak(989e12, 4.8e12),
}
TPUS = ("v5e", "v5p", "v6e")


def peak_of_kind(kind: str) -> Peak | None:
    """By a ``device_kind``; None of a chip that is not in the table."""
    chip = chip_of_kind(kind)
    return PEAKS.get(chip) if chip else None
