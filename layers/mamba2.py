"""The Mamba-2 mixer: projections around one op, convolution to gated norm (arXiv:2405.21060)."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from layers.decimation import importance, kept_places
from layers.dynamics import Dynamics
from layers.longmamba import DtFilter, DtFilterConfig
from layers.mitigations import MitigationConfig, mitigated_ssd
from layers.norm import RMSNorm
from layers.param import CALIBRATED, Initializer, Linear, param, uniform_fan_in
from layers.polarised import check_polarised, polarised
from layers.state_limits import empty_window, take
from layers.types import Context, State
from pallas_kernels.mamba2 import Form, Inputs, Weights, gated_ssd, unfused


@dataclasses.dataclass
class Mamba2Config:
    """Shapes and initial dynamics of a Mamba-2 layer; defaults are those of the published language models.

    Attributes:
        d_inner: width of x and z; None means ``expand * d_model``.
        dt_min, dt_max, dt_floor: range of softplus(dt_bias) at initialisation.
        dt_limit: clamp on dt.
        prefill_dt_min: extra lower clamp on dt for pieces longer than one token, None for none. Only for
            parity with the published Nemotron-H code, whose prefill and decode differ in this.
        ones, zeros: so many first heads have A = 0 and last heads A = -100, not learned (``polarised``).
        mitigation, dt_filter: against states that are overfilled; off by default.
        compute: implementation of the ops, None for automatic.
    """

    d_state: int = 128
    headdim: int = 64
    expand: int = 2
    d_inner: int | None = None
    n_groups: int = 1
    d_conv: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    chunk_size: int | None = None
    rmsnorm: bool = True
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    A_min: float = 1.0
    A_max: float = 16.0
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, math.inf)
    prefill_dt_min: float | None = None
    ones: int = 0
    zeros: int = 0
    mitigation: MitigationConfig = dataclasses.field(default_factory=MitigationConfig)
    dt_filter: DtFilterConfig = dataclasses.field(default_factory=DtFilterConfig)
    implementation: str | None = None

    def inner(self, d_model: int) -> int:
        """H P, the channels of a layer."""
        return self.expand * d_model if self.d_inner is None else self.d_inner


class Mamba2(nnx.Module):
    """A sequence mixer (``layers.types.SequenceMixer``) with state ``{"conv": {x, B, C}, "ssm"}``.

    ``conv`` holds the last ``d_conv - 1`` inputs of the convolution, ``ssm`` the float32 state [B, H, P, N].

    Raises:
        ValueError: the inner width is not a multiple of ``headdim``, or the heads of ``n_groups``.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        config: Mamba2Config,
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        d_inner = config.inner(d_model)
        if d_inner % config.headdim:
            raise ValueError(
                f"mamba2.headdim={config.headdim} does not divide the inner width {d_inner}; "
                f"use a divisor of {d_inner}"
            )
        heads = d_inner // config.headdim
        if heads % config.n_groups:
            raise ValueError(f"mamba2.n_groups={config.n_groups} does not divide the {heads} heads")
        config.mitigation.validate("mamba2.mitigation")
        check_polarised("mamba2", config.ones, config.zeros, below=heads)
        self.config, self.d_model, self.heads = config, d_model, heads
        bias, bc = config.proj_bias, config.n_groups * config.d_state

        def project(features: int, axis: str) -> Linear:
            return Linear(d_model, features, ("embed", axis), rngs=rngs, use_bias=bias, init=init)

        self.in_z, self.in_x = project(d_inner, "inner"), project(d_inner, "inner")
        self.in_B, self.in_C = project(bc, "groups"), project(bc, "groups")
        self.in_dt = project(heads, "heads")
        self.conv = nnx.Dict(
            x=ConvWeights(d_inner, "inner", config.d_conv, config.conv_bias, rngs=rngs),
            B=ConvWeights(bc, "groups", config.d_conv, config.conv_bias, rngs=rngs),
            C=ConvWeights(bc, "groups", config.d_conv, config.conv_bias, rngs=rngs),
        )
        learned = heads - config.ones - config.zeros
        axis = "heads" if learned == heads else None
        self.A_log = param(_init_A_log(rngs.params(), learned, config), (axis,), "dynamics/A")
        dt_range = (config.dt_min, config.dt_max, config.dt_floor)
        self.dt_bias = param(init_dt_bias(rngs.params(), heads, *dt_range), ("heads",), "dynamics/dt")
        self.D = param(jnp.ones(heads), ("heads",), "dynamics/D")
        norm = RMSNorm(
            d_inner,
            eps=config.norm_eps,
            groups=config.n_groups,
            norm_before_gate=config.norm_before_gate,
            axis="inner",
        )
        self.norm = norm if config.rmsnorm else None
        self.dt_filter = (
            None if config.dt_filter.scale is None else DtFilter(heads, "heads", config.dt_filter)
        )
        capped = config.mitigation.state_norm is not None
        self.norm_cap = param(jnp.full(heads, jnp.inf), ("heads",), CALIBRATED) if capped else None
        self.out = Linear(
            d_inner, d_model, ("inner", "embed"), rngs=rngs, use_bias=bias, init=out_init or init
        )

    def init_state(self, batch: int, max_len: int) -> State:
        """Zeros: ``conv`` [B, K - 1, C] for x, B and C, and ``ssm`` [B, H, P, N]; more with a window."""
        c, taps = self.config, self.config.d_conv - 1
        widths = {"x": c.inner(self.d_model), "B": c.n_groups * c.d_state, "C": c.n_groups * c.d_state}
        state = {
            "conv": {name: jnp.zeros((batch, taps, width)) for name, width in widths.items()},
            "ssm": jnp.zeros((batch, self.heads, c.headdim, c.d_state)),
        }
        if c.mitigation.window is None:
            return state
        sizes = (self.heads, c.headdim, c.n_groups, c.d_state)
        return state | empty_window(batch, c.mitigation.window, *sizes)

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        c = self.config
        if not c.mitigation.off or self.dt_filter is not None:
            y, state, _ = self._mitigated(x, state, ctx)
            return y, state
        before = ctx.carried(state) or {"conv": {"x": None, "B": None, "C": None}, "ssm": None}
        y, tails, final = gated_ssd(
            self.inputs(x),
            self.weights(),
            self.form(x.shape[1]),
            conv_state=before["conv"],
            initial_state=before["ssm"],
            segment_ids=ctx.segment_ids,
            implementation=c.implementation,
        )
        if state is None:
            return self.out(y), None
        after = {"conv": tails, "ssm": final}
        return self.out(y), jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)

    def decimated(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context, keep: int, tail: int
    ) -> tuple[Float[Array, "B K D"], State | None, Int[Array, "B K"] | None]:
        """A call whose SSD reads only what ``decimation.kept_places`` keeps; and the places of these."""

        def choose(dt: Float[Array, "B L H"]) -> Int[Array, "B K"]:
            return kept_places(importance(dt), keep, tail, ctx.segment_ids)

        return self._mitigated(x, state, ctx, choose)

    def _mitigated(
        self, x: Array, state: State | None, ctx: Context, choose: Callable[[Array], Array] | None = None
    ) -> tuple[Array, State | None, Array | None]:
        """A call with what is switched on; and which tokens the SSD read, None for all."""
        c = self.config
        if ctx.sequence_axis is not None and (c.mitigation.in_time or choose is not None):
            raise ValueError(
                "mamba2.mitigation: window, state_norm, bidirectional_prefix and decimation read a piece of "
                "time in order on one device; use mesh.sequence=1"
            )
        before = ctx.carried(state)
        dynamics, tails = self._dynamics(x, before, ctx)
        z, places = self.in_z(x), None if choose is None else choose(dynamics.dt)
        if places is not None:
            xs, dt, A, B, C = dynamics
            z, xs, dt, B, C = (take(t, places) for t in (z, xs, dt, B, C))
            dynamics, ctx = Dynamics(xs, dt, A, B, C), ctx.take(places)
            before = ctx.carried(before)
        cap, weights = None, self.weights()
        if self.norm_cap is not None and c.mitigation.state_norm is not None:
            cap = c.mitigation.state_norm * jax.lax.stop_gradient(self.norm_cap[...])
        y, after = mitigated_ssd(
            dynamics,
            weights.D,
            c.mitigation,
            cap=cap,
            state=before,
            segment_ids=ctx.segment_ids,
            prefix=ctx.prefix,
            chunk_size=c.chunk_size,
            implementation=c.implementation,
        )
        y = self.out(unfused.gated(y.reshape(*y.shape[:2], -1), z, weights, self.form(x.shape[1])))
        if state is None:
            return y, None, places
        after = {"conv": tails, **after}
        return y, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state), places

    def dynamics(self, x: Float[Array, "B L D"], state: State | None, ctx: Context) -> Dynamics:
        """What the SSD runs on (``layers.dynamics.Selective``)."""
        return self._dynamics(x, ctx.carried(state), ctx)[0]

    def _dynamics(self, x: Array, before: State | None, ctx: Context) -> tuple[Dynamics, dict[str, Array]]:
        """And the tails of the convolution."""
        conv = dict.fromkeys(unfused.NAMES) if before is None else before["conv"]
        inputs, weights, ids = self.inputs(x), self.weights(), ctx.segment_ids
        mixed, tails = unfused.convolve(inputs, weights, conv, ids, unfused.NAMES, self.config.implementation)
        dt = unfused.step_sizes(inputs, weights, self.form(x.shape[1]))
        dt = dt if self.dt_filter is None else self.dt_filter(dt, ctx)
        dt = dt if ids is None else jnp.where((ids != 0)[..., None], dt, 0)
        heads, groups = (self.heads, -1), (self.config.n_groups, -1)
        split = {"x": heads, "B": groups, "C": groups}
        xs, B, C = (mixed[name].reshape(*x.shape[:2], *shape) for name, shape in split.items())
        return Dynamics(xs, dt, weights.A[:, None], B, C), tails

    def inputs(self, x: Float[Array, "B L D"]) -> Inputs:
        """The projections of ``x``."""
        return Inputs(z=self.in_z(x), dt=self.in_dt(x), x=self.in_x(x), B=self.in_B(x), C=self.in_C(x))

    def weights(self) -> Weights:
        """What the op takes besides the projections."""
        return Weights(
            conv={name: (conv.weight[...], conv.bias_or_none()) for name, conv in self.conv.items()},
            dt_bias=self.dt_bias[...],
            A=polarised(-jnp.exp(self.A_log[...]), self.config.ones, self.config.zeros),
            D=self.D[...],
            norm=None if self.norm is None else self.norm.scale[...],
        )

    def form(self, length: int) -> Form:
        """What is static in a call of the op on ``length`` tokens."""
        c = self.config
        low, high = c.dt_limit
        if c.prefill_dt_min is not None and length > 1:
            low = max(low, c.prefill_dt_min)
        return Form(c.n_groups, (low, high), c.norm_eps, c.norm_before_gate, c.chunk_size)

    def flops_per_token(self, length: int) -> float:
        """Projections, convolution, and the products within a chunk and with the state."""
        c = self.config
        d_inner, bc = c.inner(self.d_model), c.n_groups * c.d_state
        chunk = min(c.chunk_size or 128, length)
        projections = 2 * self.d_model * (3 * d_inner + 2 * bc + self.heads)
        conv = 2 * c.d_conv * (d_inner + 2 * bc)
        mixing = 2 * chunk * bc + 2 * chunk * d_inner + 4 * c.d_state * d_inner
        return float(projections + conv + mixing)


class ConvWeights(nnx.Module):
    """Taps [K, C] and bias [C] of a depthwise convolution; tap K - 1 multiplies the current token."""

    def __init__(self, channels: int, axis: str, width: int, use_bias: bool, *, rngs: nnx.Rngs):
        bound, shape = width**-0.5, (width, channels)
        weight = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        bias = jax.random.uniform(rngs.params(), (channels,), jnp.float32, -bound, bound)
        self.weight = param(weight, (None, axis), "conv")
        self.bias = param(bias, (axis,), "vector") if use_bias else None

    def bias_or_none(self) -> Float[Array, " C"] | None:
        """The bias [C], None for none."""
        return None if self.bias is None else self.bias[...]


def _init_A_log(key: jax.Array, heads: int, config: Mamba2Config) -> Float[Array, " H"]:
    """log U(A_min, A_max), so that A = -exp(A_log) lies in [-A_max, -A_min]."""
    return jnp.log(jax.random.uniform(key, (heads,), jnp.float32, config.A_min, config.A_max))


def init_dt_bias(
    key: jax.Array, size: int, dt_min: float, dt_max: float, dt_floor: float
) -> Float[Array, " H"]:
    """Inverse softplus of dt, log-uniform in [dt_min, dt_max] and at least dt_floor."""
    dt = jnp.exp(jax.random.uniform(key, (size,), jnp.float32, math.log(dt_min), math.log(dt_max)))
    dt = jnp.maximum(dt, dt_floor)
    return dt + jnp.log(-jnp.expm1(-dt))
