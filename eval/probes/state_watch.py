"""A model reading on and on, its recurrent states looked at after every bucket of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eval.opened import OpenRun
from eval.probes.inside import heads_of, is_recurrent
from layers.dynamics import Selective
from layers.types import Context
from models.functional import Functional
from models.loss import chunked_cross_entropy
from models.walk import Visit, embed, final_norm, init_states, sub_layers, walk

STATISTICS = ("mean", "var", "rms", "median")


class Seen(NamedTuple):
    """What was seen after each of n buckets.

    Attributes:
        loss: nats of every target [B, L].
        layers: of every recurrent sub-layer by its index: "state" [B, n, H, 4], the ``STATISTICS`` of the
            numbers in a head's state; "conv" [B, n, 4], of the inputs that its convolution keeps;
            "log_retention" [B, n, H], what is left of the first token in the slowest state of a head; and
            means over the bucket: "x" [B, n, H], the size of a head's input, and for selective mixers "dt"
            [B, n, H] and "B" [B, n, G]. Where heads have channels, "channel_rms" [B, n, H, P]. Float32.
    """

    loss: np.ndarray
    layers: dict[int, dict[str, np.ndarray]]


def watch(opened: OpenRun, tokens: Int[np.ndarray, "B L+1"], bucket: int, say: Callable[[str], None]) -> Seen:
    """Read rows of a multiple of ``bucket`` targets, from an empty state, the state carried on."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    start, read = _programs(opened.model)
    carry, losses, looks = start(rows, length), [], []
    for begin in range(0, length, bucket):
        piece = tokens[:, begin : begin + bucket + 1].astype(np.int32)
        carry, nll, look = read(opened.params, piece[:, :-1], piece[:, 1:], carry)
        losses.append(nll)
        looks.append(look)
        if begin // bucket % 32 == 31:
            jax.block_until_ready(nll)
            say(f"{begin + bucket} of {length} tokens")
    looks = jax.device_get(looks)
    layers = {i: {k: np.stack([look[i][k] for look in looks], 1) for k in looks[0][i]} for i in looks[0]}
    for index, decay in _steady(opened).items():
        each = np.broadcast_to(decay * bucket, (rows, length // bucket, len(decay)))
        layers[index]["log_retention"] = each.astype(np.float32)
    for seen in layers.values():
        seen["log_retention"] = np.cumsum(seen["log_retention"], axis=1)
    return Seen(np.concatenate(jax.device_get(losses), axis=1), layers)


def _steady(opened: OpenRun) -> dict[int, Float[np.ndarray, " H"]]:
    """Log decay a token of the slowest state of each head, of mixers where it is always the same."""
    mixers = [layer.mixer for _, layer in sub_layers(opened.model.bind(opened.params))]
    return {
        i: np.asarray(mixer.log_eigenvalues().real.max(axis=1))
        for i, mixer in enumerate(mixers)
        if is_recurrent(mixer) and not isinstance(mixer, Selective)
    }


@functools.lru_cache(maxsize=1)
def _programs(model: Functional) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The carry before any token, and ``read(params, tokens, targets, carry) -> carry, nll, looks``."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def start(rows: int, max_len: int) -> Any:
        states = init_states(model.bind(model.shapes), rows, max_len)
        return jnp.full(rows, -1, jnp.int32), states

    @functools.partial(jax.jit, donate_argnums=3)
    def read(params: Any, tokens: Array, targets: Array, carry: Any) -> Any:
        lm, (position, states) = model.bind(params), carry
        ctx = Context.create(*tokens.shape, previous_position=position)
        visits = list(walk(lm, embed(lm, tokens, ctx), ctx, states))
        nll, _ = chunked_cross_entropy(lm, final_norm(lm, visits[-1].out), targets)
        looks = {visit.depth: _look(visit) for visit in visits if is_recurrent(visit.mixer)}
        return (ctx.positions[:, -1], [visit.after for visit in visits]), nll, looks

    return start, read


def _look(visit: Visit) -> dict[str, jax.Array]:
    """One layer after one bucket, as in `Seen` without the axis n; the retention is that of the bucket."""
    look = {"state": _statistics(heads_of(visit.after))}
    if isinstance(visit.after, Mapping):
        if visit.after["ssm"].ndim == 4:
            square = jnp.square(visit.after["ssm"].astype(jnp.float32))
            look["channel_rms"] = jnp.sqrt(square.mean(axis=-1))
        tails = [tail.reshape(tail.shape[0], -1) for tail in jax.tree.leaves(visit.after["conv"])]
        look["conv"] = _statistics(jnp.concatenate(tails, axis=1))
    if not isinstance(visit.mixer, Selective):
        return {**look, "x": jnp.linalg.norm(visit.inner, axis=-1).mean(axis=1)[:, None]}
    x, dt, A, B, _ = visit.mixer.dynamics(visit.inner, visit.before, visit.ctx)
    return {
        **look,
        "x": jnp.linalg.norm(x, axis=-1).mean(axis=1),
        "dt": dt.mean(axis=1),
        "B": jnp.linalg.norm(B, axis=-1).mean(axis=1),
        "log_retention": dt.sum(axis=1) * A.max(axis=1),
    }


def _statistics(values: Float[Array, "... n"]) -> Float[Array, "... 4"]:
    """``STATISTICS`` over the last axis, float32."""
    values = values.astype(jnp.float32)
    mean, var = values.mean(axis=-1), values.var(axis=-1)
    rms = jnp.sqrt(jnp.square(values).mean(axis=-1))
    return jnp.stack([mean, var, rms, jnp.median(values, axis=-1)], axis=-1)
