"""Depthwise causal convolution along time, with the state and the segments of a recurrence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import spmd
from pallas_kernels.causal_conv1d import gpu, reference, sharded, tpu, xla
from pallas_kernels.dispatch import Kernel, resolve

IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": reference.causal_conv1d,
    "xla": xla.causal_conv1d,
    "pallas_tpu": Kernel(tpu.causal_conv1d, tpu.unsupported, "tpu", automatic=True),
    "interpret": Kernel(functools.partial(tpu.causal_conv1d, interpret=True), tpu.unsupported),
    "pallas_gpu": Kernel(gpu.causal_conv1d, gpu.unsupported, "cuda"),
}
ACTIVATIONS = (None, "silu")
MAX_ELEMENTS = 2**31 - 1


def causal_conv1d(
    x: Float[Array, "B L C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, " C"] | None = None,
    *,
    initial_state: Float[Array, "B K-1 C"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """y_t = act(bias + sum_k weight_k x_{t-(K-1)+k}): tap K-1 multiplies the current token.

    Args:
        x: raw inputs; products accumulate in float32 or wider.
        initial_state: the K-1 inputs before the first real token, newest last, of whose segment they are;
            zero when None.
        segment_ids: 0 is padding: its output is 0, and it is neither read nor remembered. Any other change
            of id hides what came before it. The real tokens of one segment are contiguous. None means no
            padding and no resets (and no masks).
        activation: None or "silu".
        implementation: "reference", "xla", "pallas_tpu", "interpret", or None to choose.

    Under an active mesh (``spmd.active_mesh``) batch is split over (data, fsdp), channels over tensor, time
    over sequence, with one permute of K-1 rows a call.

    Returns:
        y in the dtype of ``x``; the last K-1 raw inputs of the last real token's segment, newest last, in
        the dtype of ``initial_state`` (of ``x`` when None). Both are differentiable in every float input.

    Raises:
        ValueError: shapes that do not fit together; 2^31 elements of ``x`` or more on one device; an
            unknown activation or implementation.
    """
    y, final = causal_conv1d_together(
        (x,),
        (weight,),
        (bias,),
        initial_states=(initial_state,),
        segment_ids=segment_ids,
        activation=activation,
        implementation=implementation,
    )
    return y[0], final[0]


def causal_conv1d_together(
    xs: Sequence[Float[Array, "B L _"]],
    weights: Sequence[Float[Array, "K _"]],
    biases: Sequence[Float[Array, " _"] | None],
    *,
    initial_states: Sequence[Float[Array, "B K-1 _"] | None],
    segment_ids: Int[Array, "B L"] | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> tuple[list[Float[Array, "B L _"]], list[Float[Array, "B K-1 _"]]]:
    """:func:`causal_conv1d` of several inputs that share B, L and K, such as Mamba-2's x, B and C.

    Under a mesh they share one permute, and each is split over tensor as its own channels allow.
    """
    for x, weight, bias, state in zip(xs, weights, biases, initial_states, strict=True):
        _check(x, weight, bias, state, segment_ids, activation)
    run = resolve("causal_conv1d", implementation, IMPLEMENTATIONS)

    def local(x, weight, bias, state, segment_ids):
        if x.size > MAX_ELEMENTS:
            raise ValueError(
                f"causal_conv1d: x has {x.size} elements on one device, more than 2^31 - 1; feed the "
                "sequence in pieces with initial_state, or shard it."
            )
        y, state = run(x, weight, bias, state, segment_ids, activation)
        return y.astype(x.dtype), state.astype(x.dtype)

    states = [
        jnp.zeros((x.shape[0], w.shape[0] - 1, x.shape[2]), x.dtype) if state is None else state
        for x, w, state in zip(xs, weights, initial_states)
    ]
    offsets = [jnp.zeros(x.shape[2], w.dtype) if b is None else b for x, w, b in zip(xs, weights, biases)]
    mesh = spmd.active_mesh()
    if mesh is None:
        results = [local(*inputs, segment_ids) for inputs in zip(xs, weights, offsets, states)]
    else:
        results = sharded.causal_conv1d(local, mesh, list(zip(xs, weights, offsets, states)), segment_ids)
    return [y for y, _ in results], [final.astype(s.dtype) for (_, final), s in zip(results, states)]


def _check(x, weight, bias, initial_state, segment_ids, activation) -> None:
    _check_shape("x", x, "[B, L, C]", (None,) * 3)
    batch, length, channels = x.shape
    if length < 1:
        raise ValueError(f"causal_conv1d: x has shape {x.shape}; expected at least one token (L >= 1).")
    _check_shape("weight", weight, "[K, C] with C of x", (None, channels))
    width = weight.shape[0]
    if width < 1:
        raise ValueError(
            f"causal_conv1d: weight has shape {weight.shape}; expected at least one tap (K >= 1)."
        )
    if bias is not None:
        _check_shape("bias", bias, "[C] of x", (channels,))
    if initial_state is not None:
        _check_shape("initial_state", initial_state, "[B, K-1, C]", (batch, width - 1, channels))
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, "[B, L] of x", (batch, length))
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation is {activation!r}; expected one of {ACTIVATIONS}.")


def _check_shape(name: str, array: jax.Array, meaning: str, expected: tuple[int | None, ...]) -> None:
    """``None`` in ``expected`` stands for any size."""
    fits = array.ndim == len(expected) and all(e in (None, n) for n, e in zip(array.shape, expected))
    if not fits:
        wanted = tuple("any" if e is None else e for e in expected)
        raise ValueError(f"causal_conv1d: {name} has shape {array.shape}; expected {meaning} = {wanted}.")
