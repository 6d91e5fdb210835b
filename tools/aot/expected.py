"""The collectives that a sharded program should have, by mesh axis and kind of layer.

Each row of ``EXPECTED`` says along which axes devices meet, how, over what, from which files of this
repository, and why. `tools.aot.explain` holds the collectives of a compiled program against it.
"""

from __future__ import annotations

import dataclasses

GATHER, SCATTER, REDUCE, PERMUTE = "all-gather", "reduce-scatter", "all-reduce", "collective-permute"
SUMS, MOVES = (SCATTER, REDUCE), (GATHER, PERMUTE, "all-to-all")
ROWS, TENSOR, TIME = ("data", "fsdp"), ("tensor",), ("sequence",)
ANY = (*ROWS, *TENSOR, *TIME)
PARAMETER, ACTIVATION, SCALAR = "parameter", "activation", "scalar"


@dataclasses.dataclass(frozen=True)
class Expected:
    """A row of the table.

    Attributes:
        layer: kind of layer, or "all".
        axes: of the mesh, one or several of these.
        kinds: of collectives.
        over: what the largest array may be: a parameter's part or its gradient, an activation, a few numbers.
        files: that a call it comes from stands in, beginnings of paths; () for any.
        backward: whether only gradients do it.
        anonymous: whether the compiler may have made it without a name, of several or from a layout.
    """

    name: str
    layer: str
    axes: tuple[str, ...]
    kinds: tuple[str, ...]
    over: tuple[str, ...]
    files: tuple[str, ...]
    why: str
    backward: bool = False
    anonymous: bool = False


OPS, STEP = "pallas_kernels/", "runtime/step.py"
EXPECTED = (
    Expected(
        "carry",
        "Mamba-2, S4, S5, ...",
        TIME,
        (GATHER, *SUMS),
        (ACTIVATION, PARAMETER, SCALAR),
        (f"{OPS}shard_carry.py",),
        "summaries of everyone's time are gathered, whatever the length; their gradients come back summed",
    ),
    Expected(
        "halo",
        "convolutions",
        TIME,
        (PERMUTE, REDUCE),
        (ACTIVATION, PARAMETER, SCALAR),
        (f"{OPS}causal_conv1d/", f"{OPS}time_order.py"),
        "the K-1 tokens before a piece of time, and where a row's first and last real token are",
    ),
    Expected(
        "ring",
        "attention",
        TIME,
        (PERMUTE,),
        (ACTIVATION, PARAMETER, SCALAR),
        (f"{OPS}attention/",),
        "keys and values, and their gradients, go from neighbour to neighbour",
    ),
    Expected(
        "groups of cores",
        "CCA",
        TIME,
        (GATHER, *SUMS, PERMUTE),
        (ACTIVATION, PARAMETER, SCALAR),
        (f"{OPS}cca/", "layers/cca.py"),
        "cores, one a group, are whole on every device; their gradients come back summed",
    ),
    Expected(
        "whole rows of ids",
        "all",
        TIME,
        (GATHER, REDUCE, PERMUTE, "all-to-all"),
        (ACTIVATION, PARAMETER, SCALAR),
        (f"{OPS}spmd.py", f"{OPS}segments.py", "layers/types.py", f"{OPS}attention/sharded.py"),
        "segment ids and positions, 4 bytes a token, are whole on every device of a row",
    ),
    Expected(
        "embedding table",
        "embedding",
        ("fsdp", *TIME),
        (GATHER, *SUMS),
        (PARAMETER, ACTIVATION),
        ("layers/embedding.py",),
        "its columns lie on fsdp: it is gathered for looking up and for a tied head, its gradient summed",
    ),
    Expected(
        "parameters",
        "all",
        ROWS,
        (GATHER,),
        (PARAMETER,),
        (),
        "FSDP: a matrix is gathered before it is used, in the forward and the backward pass",
        anonymous=True,
    ),
    Expected(
        "loss over the vocabulary",
        "head and loss",
        TENSOR,
        (REDUCE, GATHER),
        (ACTIVATION, SCALAR, PARAMETER),
        ("models/loss.py",),
        "the head's columns lie on tensor: maxima, sums and the target's logit of each token",
    ),
    Expected(
        "gated norm",
        "Mamba-2",
        TENSOR,
        SUMS,
        (ACTIVATION, SCALAR, PARAMETER),
        (f"{OPS}rms_norm.py", "layers/norm.py"),
        "the mean square of channels that lie on tensor, one number a token",
    ),
    Expected(
        "B and C of a group",
        "Mamba-2",
        TENSOR,
        (GATHER, *SUMS),
        (ACTIVATION, PARAMETER),
        (f"{OPS}mamba2/", f"{OPS}ssd/", f"{OPS}selective_scan/"),
        "every head of a group reads the same B and C, on whichever device; their gradients are summed",
    ),
    Expected(
        "shared keys",
        "attention",
        TENSOR,
        (GATHER, *SUMS),
        (ACTIVATION, PARAMETER),
        (f"{OPS}attention/",),
        "fewer key heads than devices: several devices read one; its gradient is summed",
    ),
    Expected(
        "partial products",
        "projections",
        TENSOR,
        SUMS,
        (ACTIVATION, PARAMETER),
        ("layers/", "models/"),
        "a product whose inner dimension lies on tensor, forward (into the residual stream) or backward (out "
        "of it), is summed; XLA may merge those of one sub-layer",
        anonymous=True,
    ),
    Expected(
        "gradients",
        "all",
        (*ROWS, *TIME),
        SUMS,
        (PARAMETER, ACTIVATION, SCALAR),
        (),
        "each device has seen other rows and other time: gradients are scattered over fsdp as they are "
        "summed, or summed whole where a parameter is not split",
        backward=True,
        anonymous=True,
    ),
    Expected(
        "whole along tensor",
        "B, C, norms, ...",
        TENSOR,
        (GATHER, *SUMS),
        (PARAMETER, SCALAR),
        (),
        "of a parameter that tensor does not split, XLA computes the gradient (or a cast) in parts",
        anonymous=True,
    ),
    Expected(
        "norms",
        "optimizer",
        ANY,
        SUMS,
        (SCALAR,),
        ("runtime/",),
        "norms of gradients, parameters and updates, and whether all is finite",
    ),
    Expected(
        "ids of an accumulated batch",
        "all",
        TIME,
        (GATHER,),
        (ACTIVATION, PARAMETER),
        (STEP,),
        "of a part of the batch, gathered where it is taken",
    ),
    Expected(
        "gradients of an accumulated batch",
        "all",
        (*ROWS, *TIME),
        SUMS,
        (PARAMETER, ACTIVATION),
        (STEP,),
        "the parts of the batch are added up on each device, and XLA sums over devices once, after the last",
    ),
    Expected(
        "loss and metrics",
        "task",
        ANY,
        SUMS,
        (SCALAR,),
        ("tasks/", "objectives/"),
        "sums over all tokens of the batch",
    ),
    Expected(
        "cache",
        "attention",
        TIME,
        (GATHER, *SUMS),
        (ACTIVATION, PARAMETER, SCALAR),
        ("layers/attention.py", "eval/"),
        "generation: keys of a prompt are gathered into every device's cache, its last hidden state is taken",
    ),
    Expected(
        "edges of time",
        "all",
        TIME,
        (PERMUTE,),
        (SCALAR,),
        (),
        "a token's id is compared with that of its neighbour",
        anonymous=True,
    ),
    Expected(
        "edges of tiles",
        "all",
        ROWS,
        (PERMUTE,),
        (PARAMETER, ACTIVATION),
        (),
        "XLA scatters gradients in whole tiles, 8 rows of float32 or 16 of bfloat16; where a device's are "
        "no whole tiles, what lies across an edge moves on",
        anonymous=True,
    ),
)
