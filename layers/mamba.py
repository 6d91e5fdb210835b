"""The Mamba-1 mixer: projections, a causal convolution, the selective scan, a gate (arXiv:2312.00752)."""

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
from layers.mamba2 import ConvWeights, init_dt_bias
from layers.param import Initializer, Linear, param, uniform_fan_in
from layers.polarised import check_polarised, polarised
from layers.state_limits import take
from layers.types import Context, State
from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.selective_scan import selective_scan


@dataclasses.dataclass
class MambaConfig:
    """Shapes and initial dynamics of a Mamba-1 layer; defaults are those of the published language models.

    Attributes:
        d_inner: width of x and z; None means ``expand * d_model``.
        dt_rank: rank of the projection to dt; None means d_model / 16, rounded up.
        dt_scale: the projection from that rank is U(-+ dt_scale / sqrt(dt_rank)) at initialisation.
        dt_min, dt_max, dt_floor: range of softplus(dt_bias) at initialisation.
        ones, zeros: so many states more, before and after the ``d_state`` learned ones, have A = 0 and
            A = -100 in every channel (``polarised``).
        select_norm_eps: divide what dt, B and C are made of by their root mean square, with this epsilon
            (Falcon-Mamba, arXiv:2410.05355); None for not.
        dt_filter: against states that are overfilled; off by default.
        implementation: of the ops, None for automatic.
    """

    d_state: int = 16
    expand: int = 2
    d_inner: int | None = None
    d_conv: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    dt_rank: int | None = None
    dt_scale: float = 1.0
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    ones: int = 0
    zeros: int = 0
    select_norm_eps: float | None = None
    dt_filter: DtFilterConfig = dataclasses.field(default_factory=DtFilterConfig)
    implementation: str | None = None

    @property
    def states(self) -> int:
        """N of a channel's state, the states that are not learned included."""
        return self.d_state + self.ones + self.zeros

    def inner(self, d_model: int) -> int:
        """E, the channels of a layer."""
        return self.expand * d_model if self.d_inner is None else self.d_inner

    def rank(self, d_model: int) -> int:
        """Of the projection to dt."""
        return math.ceil(d_model / 16) if self.dt_rank is None else self.dt_rank


class Mamba(nnx.Module):
    """A sequence mixer (``layers.types.SequenceMixer``) with state ``{"conv", "ssm"}``.

    ``conv`` [B, K-1, E] holds the last inputs of the convolution, ``ssm`` the float32 state [B, E, N].
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        config: MambaConfig,
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        check_polarised("mamba", config.ones, config.zeros)
        self.config, self.d_model = config, d_model
        d_inner, rank, bias = config.inner(d_model), config.rank(d_model), config.proj_bias

        def project(inputs: int, outputs: int, axes: tuple[str | None, str | None], **options) -> Linear:
            return Linear(inputs, outputs, axes, rngs=rngs, **{"init": init, **options})

        self.in_x = project(d_model, d_inner, ("embed", "inner"), use_bias=bias)
        self.in_z = project(d_model, d_inner, ("embed", "inner"), use_bias=bias)
        self.conv = ConvWeights(d_inner, "inner", config.d_conv, config.conv_bias, rngs=rngs)
        self.to_dt = project(d_inner, rank, ("inner", None))
        self.to_B = project(d_inner, config.states, ("inner", "state"))
        self.to_C = project(d_inner, config.states, ("inner", "state"))
        bound = config.dt_scale * rank**-0.5
        self.dt = project(
            rank,
            d_inner,
            (None, "inner"),
            init=lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound),
        )
        dt_range = (config.dt_min, config.dt_max, config.dt_floor)
        self.dt_bias = param(init_dt_bias(rngs.params(), d_inner, *dt_range), ("inner",), "dynamics/dt")
        A = jnp.broadcast_to(jnp.arange(1.0, config.d_state + 1), (d_inner, config.d_state))
        self.A_log = param(jnp.log(A), ("inner", "state"), "dynamics/A")
        self.D = param(jnp.ones(d_inner), ("inner",), "dynamics/D")
        self.dt_filter = (
            None if config.dt_filter.scale is None else DtFilter(d_inner, "inner", config.dt_filter)
        )
        self.out = project(d_inner, d_model, ("inner", "embed"), use_bias=bias, init=out_init or init)

    def init_state(self, batch: int, max_len: int) -> State:
        """Zeros: ``conv`` [B, K - 1, E] and ``ssm`` [B, E, N]."""
        c, d_inner = self.config, self.config.inner(self.d_model)
        return {
            "conv": jnp.zeros((batch, c.d_conv - 1, d_inner)),
            "ssm": jnp.zeros((batch, d_inner, c.states)),
        }

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        y, state, _ = self._call(x, state, ctx)
        return y, state

    def decimated(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context, keep: int, tail: int
    ) -> tuple[Float[Array, "B K D"], State | None, Int[Array, "B K"] | None]:
        """A call whose scan reads only what ``decimation.kept_places`` keeps; and the places of these."""

        def choose(dt: Float[Array, "B L E"]) -> Int[Array, "B K"]:
            return kept_places(importance(dt), keep, tail, ctx.segment_ids)

        return self._call(x, state, ctx, choose)

    def _call(
        self, x: Array, state: State | None, ctx: Context, choose: Callable[[Array], Array] | None = None
    ) -> tuple[Array, State | None, Array | None]:
        """y, the state, and which tokens the scan read, None for all."""
        before = ctx.carried(state) or {"conv": None, "ssm": None}
        z = self.in_z(x)
        x, tail = self._convolve(x, before["conv"], ctx)
        dt, A, B, C = self._select(x, ctx)
        places = None if choose is None else choose(dt)
        if places is not None:
            z, x, dt, B, C = (take(t, places) for t in (z, x, dt, B, C))
            ctx = ctx.take(places)
            before = ctx.carried(before) if state is not None else before
        y, final = selective_scan(
            x,
            dt,
            A,
            B,
            C,
            self.D[...],
            initial_state=before["ssm"],
            segment_ids=ctx.segment_ids,
            implementation=self.config.implementation,
        )
        y = self.out(y * jax.nn.silu(z))
        if state is None:
            return y, None, places
        after = {"conv": tail, "ssm": final}
        return y, jax.tree.map(lambda new, old: new.astype(old.dtype), after, state), places

    def dynamics(self, x: Float[Array, "B L D"], state: State | None, ctx: Context) -> Dynamics:
        """What the scan runs on (``layers.dynamics.Selective``)."""
        before = ctx.carried(state) or {"conv": None}
        x, _ = self._convolve(x, before["conv"], ctx)
        dt, A, B, C = self._select(x, ctx)
        dt = dt if ctx.segment_ids is None else jnp.where((ctx.segment_ids != 0)[..., None], dt, 0)
        return Dynamics(x[..., None], dt, A, B[:, :, None], C[:, :, None])

    def _convolve(self, x: Array, tail: Array | None, ctx: Context) -> tuple[Array, Array]:
        """What the scan reads [B, L, E], and the inputs [B, K-1, E] that the next token needs."""
        return causal_conv1d(
            self.in_x(x),
            self.conv.weight[...],
            self.conv.bias_or_none(),
            initial_state=tail,
            segment_ids=ctx.segment_ids,
            activation="silu",
            implementation=self.config.implementation,
        )

    def _select(self, x: Float[Array, "B L E"], ctx: Context) -> tuple[Array, Array, Array, Array]:
        """dt [B, L, E], A [E, N], B and C [B, L, N]."""
        c, bias = self.config, self.dt_bias[...]
        low_rank, B, C = self.to_dt(x), self.to_B(x), self.to_C(x)
        if c.select_norm_eps is not None:
            low_rank, B, C = (_divided_by_rms(t, c.select_norm_eps) for t in (low_rank, B, C))
        dt = jax.nn.softplus(self.dt(low_rank).astype(bias.dtype) + bias)
        dt = dt if self.dt_filter is None else self.dt_filter(dt, ctx)
        A = polarised(-jnp.exp(self.A_log[...]), c.ones, c.zeros)
        return dt, A, B, C

    def flops_per_token(self, length: int) -> float:
        """Projections, convolution, and 6 operations a state: dt A, decay, input, output."""
        c, d_inner, rank = self.config, self.config.inner(self.d_model), self.config.rank(self.d_model)
        projections = 2 * d_inner * (3 * self.d_model + 2 * rank + 2 * c.states)
        return float(projections + 2 * c.d_conv * d_inner + 6 * d_inner * c.states)


def _divided_by_rms(x: Float[Array, "B L C"], eps: float) -> Float[Array, "B L C"]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return rms_norm(wide, jnp.ones(x.shape[-1], wide.dtype), 1, eps).astype(x.dtype)
