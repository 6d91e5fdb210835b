"""Softmax attention of queries over one or several key sources, in one softmax.

``reference`` is dense and the truth. ``xla`` and ``pallas_tpu`` are blockwise with memory O(L)
(``blockwise.py``), and None takes the one for the platform. ``cudnn`` is NVIDIA's fused kernel behind
``jax.nn.dot_product_attention``, by name only: it has not been run on hardware here, and cannot be traced on
a machine without a GPU. Under a mesh, batch, heads and time are sharded and time goes around a ring
(``sharded.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, overload

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, spmd
from pallas_kernels.attention import blockwise, cudnn, reference, sharded
from pallas_kernels.attention.sources import MASKED, Alibi, Mask, Source
from pallas_kernels.dispatch import Kernel

__all__ = ["MASKED", "Alibi", "Mask", "Source", "attention"]

_named = {name: functools.partial(blockwise.attention, implementation=name) for name in blockwise.FORWARD}
IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": reference.attention,
    "xla": _named["xla"],
    "pallas_tpu": Kernel(_named["pallas_tpu"], blockwise.unsupported, "tpu", automatic=True),
    "interpret": Kernel(_named["interpret"], blockwise.unsupported),
    "cudnn": cudnn.attention,
}
INDEX_LIMIT = 2**31 - 1  # positions and slots are int32


@overload
def attention(
    q: Array,
    sources: Sequence[Source],
    *,
    q_segment_ids: Array | None = ...,
    softmax_scale: float | None = ...,
    bias: Alibi | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Array: ...


@overload
def attention(
    q: Array,
    sources: Sequence[Source],
    *,
    q_segment_ids: Array | None = ...,
    softmax_scale: float | None = ...,
    bias: Alibi | None = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Array, Array]: ...


def attention(
    q: Float[Array, "B Lq H E"],
    sources: Sequence[Source],
    *,
    q_segment_ids: Int[Array, "B Lq"] | None = None,
    softmax_scale: float | None = None,
    bias: Alibi | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B Lq H E"] | tuple[Float[Array, "B Lq H E"], Float[Array, "B H Lq"]]:
    """Attention of ``q`` over the union of the keys of all ``sources``.

    Args:
        q: queries, float32 or narrower; products accumulate and the softmax runs in float32.
        sources: keys, values and what is visible of them.
        q_segment_ids: queries see keys of their own segment only; 0 is padding and sees nothing.
        softmax_scale: of the logits; E ** -0.5 when None.
        bias: added to the logits in closed form.
        return_lse: also return the log-sum-exp of the logits, float32.
        implementation: "reference", "xla", "pallas_tpu", "interpret", "cudnn", or None to choose.

    Returns:
        The output in the dtype of ``q`` (and the log-sum-exp). A query that sees no key gives 0, and a
        log-sum-exp of ``MASKED``; its gradients are 0.

    Raises:
        ValueError: shapes or ids that do not fit together; an implementation that cannot do what is asked;
            heads that the mesh's tensor axis does not divide.
    """
    sources = tuple(sources)
    _check(q, sources, q_segment_ids, bias)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    run = dispatch.resolve("attention", implementation, IMPLEMENTATIONS)
    if run is cudnn.attention and (problem := cudnn.unsupported(q, sources, q_segment_ids, bias, return_lse)):
        if implementation is not None:
            raise ValueError(f"attention: implementation='cudnn' cannot run this call: {problem}. Use 'xla'.")
        run = _named["xla"]
    mesh = spmd.active_mesh()
    if mesh is not None and run is not reference.attention:
        out, lse = sharded.attention(mesh, run, q, sources, q_segment_ids, scale, bias, implementation)
    else:
        out, lse = run(q, sharded.in_time(sources, q.shape[1]), q_segment_ids, scale, bias)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _check(q: Array, sources: tuple[Source, ...], q_segment_ids: Array | None, bias: Alibi | None) -> None:
    batch, length, heads, width = q.shape
    if not sources:
        raise ValueError("attention: no key sources; pass at least one Source(k, v).")
    if bias is not None and bias.slopes.shape != (heads,):
        raise ValueError(f"attention: Alibi slopes {bias.slopes.shape} for {heads} heads; use one a head.")
    for i, source in enumerate(sources):
        name, keys = f"attention: sources[{i}]", source.k.shape
        if source.v.shape != keys or len(keys) != 4 or (keys[0], keys[3]) != (batch, width):
            raise ValueError(
                f"{name}: k is {keys} and v {source.v.shape}; for q {q.shape} both must be "
                f"[{batch}, Lk, K, {width}]."
            )
        if heads % keys[2]:
            raise ValueError(f"{name}: {keys[2]} key heads do not divide {heads} query heads.")
        if not 0 < min(length, keys[1]) <= max(length, keys[1]) < INDEX_LIMIT:
            raise ValueError(
                f"{name}: lengths {length} and {keys[1]} must be in 1..{INDEX_LIMIT - 1} (int32)."
            )
        if source.kv_segment_ids is not None and q_segment_ids is None:
            raise ValueError(f"{name}.kv_segment_ids is given without q_segment_ids; pass both.")
        of_keys = ("kv_positions", "kv_segment_ids", "kv_window_positions")
        for field, expected in {"q_positions": length, **dict.fromkeys(of_keys, keys[1])}.items():
            value = getattr(source, field)
            if value is not None and value.shape != (batch, expected):
                raise ValueError(f"{name}.{field} is {value.shape}, expected {(batch, expected)}.")
        if source.kv_length is not None and source.kv_length.shape != (batch,):
            raise ValueError(f"{name}.kv_length is {source.kv_length.shape}, expected {(batch,)}.")
    if q_segment_ids is not None and q_segment_ids.shape != (batch, length):
        raise ValueError(f"attention: q_segment_ids is {q_segment_ids.shape}, expected {(batch, length)}.")
