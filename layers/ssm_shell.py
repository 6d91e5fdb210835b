"""What S4, S4D and DSS share: which op runs their linear system, and what surrounds it.

    y = system(u) + D u,   then GELU (erf), dropout and a linear layer, gated (GLU) in S4 and S4D.

A system is linear and time invariant, so it is a convolution with its kernel, or a recurrence with a state.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float, Int

from layers.dropout import dropout
from layers.param import Initializer, Linear, param
from layers.ssm_params import as_complex, as_pairs
from layers.types import Context, State
from pallas_kernels import spmd
from pallas_kernels.long_conv import long_conv
from pallas_kernels.lti_ssm import lti_ssm


@dataclasses.dataclass
class LinearSSMConfig:
    """What the configs of S4, S4D and DSS have in common.

    Attributes:
        d_state: N, the number of states of each feature.
        dt_min, dt_max: range of the step size at initialisation.
        bidirectional: a second system of each feature reads what comes after a token, the token not included.
        dropout: rate before the output layer; ``tie_dropout`` zeroes a feature in all tokens of a row.
        implementation: of the ops, None for automatic.
    """

    d_state: int = 64
    dt_min: float = 1e-3
    dt_max: float = 0.1
    bidirectional: bool = False
    dropout: float = 0.0
    tie_dropout: bool = False
    implementation: str | None = None

    @property
    def sides(self) -> int:
        """J: systems a feature."""
        return 2 if self.bidirectional else 1


class LinearSSM(nnx.Module):
    """A sequence mixer around a linear system of each feature; a subclass gives the system.

    It has ``kernel``, ``recurrence``, ``log_eigenvalues`` and ``state_shape``. Whole sequences of one
    segment, padded on the right or not, are convolved by FFT; with a state, with packed documents, where
    time is sharded, and on TPU, the recurrence runs. Outputs of the FFT depend on later inputs by rounding
    errors: ``exact_causality`` is False.
    """

    exact_causality = False

    def __init__(
        self,
        d_model: int,
        config: LinearSSMConfig,
        *,
        glu: bool,
        rngs: nnx.Rngs,
        init: Initializer,
        out_init: Initializer | None,
    ):
        if not 0 < config.dt_min <= config.dt_max:
            raise ValueError(
                f"{type(self).__name__.lower()}: dt_min={config.dt_min} and dt_max={config.dt_max}; expected "
                "0 < dt_min <= dt_max"
            )
        self.config, self.d_model, self.causal = config, d_model, not config.bidirectional
        self.D = param(jax.random.normal(rngs.params(), (d_model,)), ("inner",), "dynamics/D")

        def output(init: Initializer) -> Linear:
            return Linear(d_model, d_model, ("inner", "embed"), rngs=rngs, use_bias=True, init=init)

        self.out = output(out_init or init)
        self.gate = output(init) if glu else None

    def kernel(self, length: int) -> Float[Array, "J H L"]:
        """Response of each system to an impulse."""
        raise NotImplementedError

    def recurrence(
        self,
        u: Float[Array, "B L H"],
        side: int,
        state: State | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L H"], State]:
        """System ``side`` run as a recurrence: 0 in the direction of time, 1 from the end."""
        raise NotImplementedError

    def _diagonal(
        self,
        u: Float[Array, "B L H"],
        log_A: Complex[Array, "H N"],
        B: Complex[Array, "H N"],
        C: Complex[Array, "H N"],
        side: int,
        state: State | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L H"], State]:
        """The recurrence of a diagonal system, whose state is kept as real pairs [B, H, N, 2]."""
        y, after = lti_ssm(
            u,
            log_A,
            B,
            C,
            initial_state=None if state is None else as_complex(state),
            segment_ids=segment_ids,
            reverse=side == 1,
            implementation=self.config.implementation,
        )
        return y, as_pairs(after)

    def log_eigenvalues(self) -> Complex[Array, "H N"]:
        """Of the step from token to token (``layers.dynamics.TimeInvariant``)."""
        raise NotImplementedError

    def response(self, length: int) -> Float[Array, "H L"]:
        """|K_l| of every feature (``layers.dynamics.TimeInvariant``)."""
        return jnp.abs(self.kernel(length)[0])

    def state_shape(self) -> tuple[int, ...]:
        """Shape of the state of one row."""
        raise NotImplementedError

    def init_state(self, batch: int, max_len: int) -> State:
        """Zeros, float32; a bidirectional layer raises ValueError."""
        self._refuse_state()
        return jnp.zeros((batch, *self.state_shape()))

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        u = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if state is not None:
            self._refuse_state()
        y, after = self._system(u, ctx.carried(state), ctx)
        y = jax.nn.gelu(y + self.D[...] * u, approximate=False)
        inner = ctx if ctx.key is None else ctx.with_key(jax.random.fold_in(ctx.key, 1))
        y = dropout(y, self.config.dropout, inner, tied=self.config.tie_dropout).astype(x.dtype)
        out = self.out(y) if self.gate is None else self.out(y) * jax.nn.sigmoid(self.gate(y))
        return out, None if state is None else after.astype(state.dtype)

    def _system(self, u: jax.Array, state: State | None, ctx: Context) -> tuple[jax.Array, State]:
        ids, length = ctx.segment_ids, u.shape[1]
        whole = ids is None or ctx.right_padded
        if state is None and whole and length > 1 and spmd.sequence_parts() == 1:
            # On TPU XLA's FFT moves many times the bytes of the recurrence (4 for S4): matrix products there.
            walk = functools.partial(self._walked, u, None, ids)
            convolve = functools.partial(self._convolved, u, ids)
            return jax.lax.platform_dependent(tpu=lambda: walk()[0], default=convolve), None
        return self._walked(u, state, ids)

    def _convolved(self, u: jax.Array, ids: jax.Array | None) -> jax.Array:
        both = self.config.bidirectional
        u = u if ids is None else jnp.where((ids != 0)[..., None], u, 0)
        K = self.kernel(u.shape[1])
        K = K if both else K[0]
        return long_conv(u, K, bidirectional=both, implementation=self.config.implementation)

    def _walked(self, u: jax.Array, state: State | None, ids: jax.Array | None) -> tuple[jax.Array, State]:
        y, after = self.recurrence(u, 0, state, ids)
        if self.config.bidirectional:
            y += _from_next(self.recurrence(u, 1, None, ids)[0], ids)
        return y, after

    def _refuse_state(self) -> None:
        if self.config.bidirectional:
            raise ValueError(
                f"{type(self).__name__}: bidirectional=True reads from the end and cannot carry a state; "
                "feed whole sequences with state=None, or set bidirectional=False."
            )

    def flops_per_token(self, length: int) -> float:
        """Three real FFTs of twice the length a side, and the output layer; kernels are made once a batch."""
        convolution = 15 * math.log2(2 * max(length, 2)) * self.d_model * self.config.sides
        return convolution + 2.0 * self.d_model**2 * (1 if self.gate is None else 2)


def _from_next(y: Float[Array, "B L H"], segment_ids: Int[Array, "B L"] | None) -> Float[Array, "B L H"]:
    """At each token, y of the next one if that is of the same segment."""
    ahead = jnp.concatenate([y[:, 1:], jnp.zeros_like(y[:, :1])], axis=1)
    if segment_ids is None:
        return ahead
    following = jnp.concatenate([segment_ids[:, 1:], jnp.zeros_like(segment_ids[:, :1])], axis=1)
    return jnp.where((following == segment_ids)[..., None], ahead, 0)
