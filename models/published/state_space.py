"""S4, S4D and DSS layers under the names and in the layouts of their authors (state-spaces/s4, ag1988/dss).

Of S4 the authors' code keeps one thing more, ``layer.kernel.l_kernel``: the length that C is made for, which
is ``s4.l_max`` of the config.
"""

from __future__ import annotations

from collections.abc import Callable

from models.config import ClassifierConfig, LMConfig
from models.published.blocks import Path, Tensor, repeat_of, stack
from models.published.tensors import Shapes, slots

Axes = Callable[[int], tuple[int | None, ...]]  # of a tensor, by the number of axes of the parameter
SAME: Axes = lambda rank: tuple(range(rank))  # noqa: E731
ROW: Axes = lambda rank: (None, *range(rank))  # noqa: E731
COLUMN: Axes = lambda rank: (*range(rank), None)  # noqa: E731
TURNED: Axes = lambda rank: tuple(reversed(range(rank)))  # noqa: E731
Row = tuple[str, Axes, tuple[str, ...], int]  # name, layout, parameters, and the axis they are stacked along

S4: list[Row] = [
    *((f"layer.kernel.{name}", SAME, (name,), 0) for name in ("A_real", "A_imag", "P", "C")),
    ("layer.kernel.B", ROW, ("B",), 0),
    ("layer.kernel.inv_dt", COLUMN, ("inv_dt",), 0),
    ("layer.D", ROW, ("D",), 0),
    ("output_linear.0.weight", TURNED, ("out.kernel", "gate.kernel"), 0),
    ("output_linear.0.bias", SAME, ("out.bias", "gate.bias"), 0),
]
DSS: list[Row] = [
    ("kernel.log_dt", SAME, ("log_dt",), 0),
    ("kernel.W", SAME, ("W",), 0),
    ("D", ROW, ("D",), 0),
    ("output_linear.weight", TURNED, ("out.kernel",), 0),
    ("output_linear.bias", COLUMN, ("out.bias",), 0),
]
DSS_FREE: list[Row] = [("kernel.Lambda", COLUMN, ("Lambda_re", "Lambda_im"), 1)]
DSS_EXP: list[Row] = [
    ("kernel.Lambda_log_neg_re", SAME, ("Lambda_re",), 0),
    ("kernel.Lambda_im", SAME, ("Lambda_im",), 0),
]


def plain_tensors(config: LMConfig | ClassifierConfig, shapes: Shapes) -> list[Tensor]:
    """Every parameter of a model: S4, S4D and DSS layers as "layers.N." and their authors' names, N counting
    all sub-layers; whatever else there is under its own path, in our layout."""
    exponential = config.dss.kernel_type.startswith("exp")
    tables = {"S": S4, "D": S4, "d": DSS + (DSS_EXP if exponential else DSS_FREE)}
    if isinstance(config, LMConfig):
        places = slots(config)
    else:
        places = [(("encoder", "layers", i), None) for i in range(len(config.layers))]
    tensors, named = [], set[Path]()
    for depth, (symbol, (prefix, index)) in enumerate(zip(config.layers, places)):
        for name, axes, parts, axis in tables.get(symbol, []):
            paths = [(*prefix, "mixer", *part.split(".")) for part in parts]
            paths = [path for path in paths if path in shapes]  # S4D may have no A_imag
            ranks = [len(shapes[path]) - (index is not None) for path in paths]
            blocks = [repeat_of(path, shapes[path], index, axes(rank)) for path, rank in zip(paths, ranks)]
            if blocks:
                tensors.append(stack(f"layers.{depth}.{name}", blocks, axis))
                named.update(paths)
    for path in shapes:
        if path not in named:
            block = repeat_of(path, shapes[path], None, SAME(len(shapes[path])))
            tensors.append(stack(".".join(map(str, path)), [block], 0))
    return tensors
