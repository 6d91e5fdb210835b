"""Core-context-aware attention: recent tokens as they are, older ones as one core a group, in one softmax.

Chen et al. 2024 (arXiv 2412.12465). A query sees the last ``window`` to ``window + group_size - 1`` tokens,
and before them a core key and value of each group of ``group_size`` tokens, pooled by what the group's last
token attends to (``pooling.py``). L tokens cost L (window + group_size) + L^2 / group_size scores.

The attention is a call of ``pallas_kernels.attention`` with two sources, cores and tokens, and runs wherever
that does: on TPU in its kernels, elsewhere, on GPU too, in blocks in plain XLA, never [L, L]; on a mesh with
time sharded, cores go around the ring, tokens as far as the window. A core is seen from ``window`` tokens
after its last token on, which is a causal mask at a position moved by ``window``; a token is seen while its
group's core is not, which is a window that is measured to the start of its group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import Mask, Source, attention, tpu
from pallas_kernels.cca import reference
from pallas_kernels.cca.groups import Groups
from pallas_kernels.cca.pooling import POOLINGS, pool, pool_slots
from pallas_kernels.dispatch import Kernel

__all__ = [
    "POOLINGS",
    "Groups",
    "all_seen",
    "core_context_attention",
    "core_source",
    "local_span",
    "pool",
    "pool_slots",
    "token_source",
]


def core_context_attention(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B L K E"],
    v: Float[Array, "B L K E"],
    *,
    group_size: int,
    window: int,
    segment_ids: Int[Array, "B L"] | None = None,
    softmax_scale: float | None = None,
    literal_boundary: bool = False,
    pooling: str = "mean",
    implementation: str | None = None,
) -> Float[Array, "B L H E"]:
    """Causal attention over cores and recent tokens.

    Args:
        q, k, v: float32 or narrower, positions already in them; query head h reads key head h * K // H.
        group_size: g, tokens of a group. Groups count from the start of each document.
        window: s, tokens that every query sees at least (fewer at the start of a document).
        segment_ids: documents, the tokens of each contiguous; 0 is padding, which no group holds and nobody
            sees. None for one document.
        softmax_scale: of the logits, of pooling too; E ** -0.5 when None.
        literal_boundary: also see the last token of the newest visible core, which the formula printed in the
            paper counts twice.
        pooling: the paper has one key head for each query head. "mean": a core a key head, weighted by the
            mean over its query heads; "per_head": a core a query head.
        implementation: "reference", "xla", "pallas_tpu", "interpret", or None to choose.

    Returns:
        y in the dtype of ``q``, 0 at padding. For L < window + group_size it is full attention to the bit.

    Raises:
        ValueError: sizes below 1, an unknown ``pooling``, shapes that do not fit together; what
            ``attention`` raises.
    """
    _check(q, k, v, segment_ids, group_size, window, pooling)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    available: Mapping[str, Callable | Kernel] = _AUTOMATIC if implementation is None else IMPLEMENTATIONS
    run = dispatch.resolve("core_context_attention", implementation, available)
    return run(q, k, v, segment_ids, group_size, window, scale, literal_boundary, pooling)


def local_span(group_size: int, window: int, literal_boundary: bool = False) -> int:
    """Tokens that a query sees at most: the window, and the tokens of a group whose core it does not see."""
    return window + group_size - (0 if literal_boundary else 1)


def all_seen(length: int, group_size: int, window: int) -> bool:
    """Whether no token of so short a document sees a core: full attention."""
    return length < window + group_size


def token_source(k: Array, v: Array, segment_ids: Array | None, groups: Groups, span: int) -> Source:
    """The tokens of a row as keys, each seen until the core of its group is; ``span``: `local_span`."""
    mask = Mask(causal=True, window=span)
    return Source(k, v, kv_segment_ids=segment_ids, mask=mask, kv_window_positions=groups.starts)


def core_source(cores: Sequence[Array], groups: Groups, window: int) -> Source:
    """``cores``, keys and values [B, M, C, E], as keys: seen from ``window`` tokens after their last on."""
    k, v = cores
    positions = groups.last + window
    return Source(k, v, None, positions, groups.segment_ids, mask=Mask(causal=True))


def _two_sources(
    q, k, v, segment_ids, group_size, window, scale, literal_boundary, pooling, *, implementation=None
) -> Array:
    run = functools.partial(
        attention, q, q_segment_ids=segment_ids, softmax_scale=scale, implementation=implementation
    )
    if all_seen(q.shape[1], group_size, window):
        return run([Source(k, v, kv_segment_ids=segment_ids, mask=Mask(causal=True))])
    batch, length = q.shape[:2]
    groups = Groups.of(batch, length, group_size, segment_ids, literal_boundary=literal_boundary)
    cores = pool(q, k, v, groups, scale=scale, pooling=pooling)
    span = local_span(group_size, window, literal_boundary)
    return run([core_source(cores, groups, window), token_source(k, v, segment_ids, groups, span)])


def _refused(q: Array, k: Array, v: Array, *_) -> str | None:
    return tpu.refused(q, k, v)


_named = {n: functools.partial(_two_sources, implementation=n) for n in ("xla", "pallas_tpu", "interpret")}
IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": reference.core_context_attention,
    "xla": _named["xla"],
    "pallas_tpu": Kernel(_named["pallas_tpu"], _refused, "tpu", automatic=True),
    "interpret": Kernel(_named["interpret"], _refused),
}
# The platform's implementation is chosen where it matters, in the attention.
_AUTOMATIC: dict[str, Callable | Kernel] = {
    "reference": reference.core_context_attention,
    "xla": _two_sources,
}


def _check(q, k, v, segment_ids, group_size: int, window: int, pooling: str) -> None:
    name = "core_context_attention"
    if group_size < 1 or window < 1:
        raise ValueError(f"{name}: group_size={group_size} and window={window} must be at least 1.")
    if pooling not in POOLINGS:
        raise ValueError(f"{name}: pooling={pooling!r} does not exist; use one of {POOLINGS}.")
    batch, length, heads, width = q.shape
    if k.shape != v.shape or k.shape != (batch, length, k.shape[2], width) or heads % k.shape[2]:
        raise ValueError(
            f"{name}: k is {k.shape} and v {v.shape}; for q {q.shape} both must be [{batch}, {length}, K, "
            f"{width}] with K that divides {heads}."
        )
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"{name}: segment_ids is {segment_ids.shape}, expected {(batch, length)}.")
