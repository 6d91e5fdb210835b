"""Which Pathfinder: its size, the length of its contours, and the drawing constants of each size."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How images of one size are drawn; lengths in pixels.

    Attributes:
        padding: width of the border that no dash may touch.
        seed_distance: between the first dashes of the two contours.
        length, thickness: of a dash.
        margins: free space around a dash; one of these for each image.
        marker_radius: of the discs.
        continuity: how straight contours are.
        contour_contrast, distractor_contrast: brightness of their dashes; that of a disc is 1.
        distractor_dashes: of all distractors together.
    """

    padding: int
    seed_distance: int
    length: int
    thickness: float
    margins: tuple[int, ...]
    marker_radius: float
    continuity: float
    contour_contrast: float
    distractor_contrast: float
    distractor_dashes: int


# Those of the data sets of the Long Range Arena.
GEOMETRY = {
    32: Geometry(1, 7, 2, 0.5, (1,), 1.5, 1.0, 1.5, 2.0, 20),
    64: Geometry(1, 12, 5, 1.0, (1,), 2.5, 1.8, 0.8, 0.8, 22),
    128: Geometry(1, 20, 5, 1.5, (2, 3), 3.0, 1.8, 0.9, 0.9, 35),
    256: Geometry(22, 27, 5, 2.0, (3,), 5.0, 1.8, 1.0, 1.0, 30),
}
DIFFICULTIES = {"easy": 6, "intermediate": 9, "hard": 14}  # dashes of a contour


@dataclasses.dataclass(frozen=True)
class PathfinderSpec:
    """Images of one kind.

    Attributes:
        resolution: side in pixels: 32 (Pathfinder), 64, 128 (Path-X) or 256 (Path-256).
        contour_length: dashes of each of the two contours; see `DIFFICULTIES`. Benchmarks use 14.
        unbiased_seed: start snakes in any direction. Not so in the public data: there, at 32 x 32, the first
            contour and the distractors only start towards the upper left. (Rounding on their way still makes
            the upper left a little brighter.)
    """

    resolution: int = 32
    contour_length: int = 14
    unbiased_seed: bool = False

    def __post_init__(self) -> None:
        if self.resolution not in GEOMETRY:
            raise ValueError(f"resolution={self.resolution} should be one of {sorted(GEOMETRY)}")
        if self.contour_length < 3:
            raise ValueError(
                f"contour_length={self.contour_length} should be at least 3, and is "
                f"{' or '.join(f'{n} ({name})' for name, n in DIFFICULTIES.items())} in the public data"
            )

    @property
    def geometry(self) -> Geometry:
        """Sizes of dashes and margins at this resolution."""
        return GEOMETRY[self.resolution]

    @property
    def distractor_length(self) -> int:
        """Dashes of a distractor."""
        return self.contour_length // 3

    @property
    def distractors(self) -> int:
        """How many an image has."""
        return self.geometry.distractor_dashes // self.distractor_length

    @property
    def radius(self) -> dict[int, int]:
        """Of the square that holds a dash and the space around it, by margin; from the end of the dash."""
        shape = self.geometry
        return {margin: shape.length + math.ceil(shape.thickness) + margin for margin in shape.margins}
