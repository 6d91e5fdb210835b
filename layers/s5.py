"""The S5 mixer: one diagonal state space for all features, a parallel scan, a gate (arXiv:2208.04933).

    h_t = Lambda_bar h_{t-1} + B_bar u_t,   s_t = 2 Re(C h_t) + D u_t,   then GELU and a gate.

Norm, residual and dropout around it are the backbone's.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float, Int

from layers import hippo
from layers.dropout import dropout
from layers.param import Initializer, Linear, param, project, uniform_fan_in
from layers.ssm_params import as_complex, as_pairs, complex_normal
from layers.types import Context, State
from pallas_kernels.linear_scan import linear_scan

DISCRETIZATIONS = ("zoh", "bilinear")
C_INITS = ("trunc_standard_normal", "lecun_normal", "complex_normal")
ACTIVATIONS = ("gelu", "full_glu", "half_glu1", "half_glu2")
CLIP_EIGS = -1e-4  # bound on Re(Lambda)


@dataclasses.dataclass
class S5Config:
    """Shape and initial dynamics of an S5 layer, in the terms of the authors' code.

    Attributes:
        d_state: P, the number of states; with ``conj_sym`` half of them are stored, conjugates implied.
        blocks: J; Lambda is J times the spectrum of the HiPPO-LegS matrix of size P / J.
        discretization: "zoh" or "bilinear".
        C_init: "trunc_standard_normal", "lecun_normal" (both in the eigenbasis; the second divides by the
            number of features too) or "complex_normal".
        clip_eigs: hold Re(Lambda) at or below -1e-4.
        dt_min, dt_max: range of the step sizes at initialisation.
        step_rescale: factor on all step sizes, for inputs sampled at another rate.
        bidirectional: a second scan from the end, with the same Lambda and B, read out by a C of its own.
        activation: "gelu" (tanh form), or with gates of g = gelu(s): "full_glu" W1 g * sigmoid(W2 g),
            "half_glu1" g * sigmoid(W2 g), "half_glu2" s * sigmoid(W2 g).
        dropout: rate after the GELU; one mask for all tokens of a row.
        implementation: of the scan, None for automatic.
    """

    d_state: int = 256
    blocks: int = 1
    conj_sym: bool = True
    discretization: str = "zoh"
    C_init: str = "trunc_standard_normal"
    clip_eigs: bool = False
    dt_min: float = 1e-3
    dt_max: float = 0.1
    step_rescale: float = 1.0
    bidirectional: bool = False
    activation: str = "half_glu1"
    dropout: float = 0.0
    implementation: str | None = None

    @property
    def stored(self) -> int:
        """States that are computed."""
        return self.d_state // 2 if self.conj_sym else self.d_state

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        for field, known in (
            ("discretization", DISCRETIZATIONS),
            ("C_init", C_INITS),
            ("activation", ACTIVATIONS),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"s5.{field}={getattr(self, field)!r} is unknown; use one of {known}")
        if self.blocks < 1 or self.d_state % (2 * self.blocks):
            raise ValueError(
                f"s5.d_state={self.d_state} is not an even number of states for each of s5.blocks="
                f"{self.blocks}; use a multiple of {2 * max(self.blocks, 1)}"
            )


class S5(nnx.Module):
    """A sequence mixer (``layers.types.SequenceMixer``); its state is the complex [B, P] as float32 pairs.

    Raises:
        ValueError: a config value that cannot work; a state given to a bidirectional layer.
    """

    def __init__(
        self,
        d_model: int,
        config: S5Config,
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        config.validate()
        self.config, self.d_model, self.causal = config, d_model, not config.bidirectional
        Lambda, V = (jnp.asarray(t) for t in spectrum(config))
        self.Lambda = param(as_pairs(Lambda), ("inner", None), "dynamics/A")
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        log_step = jax.random.uniform(rngs.params(), (config.stored,), jnp.float32, low, high)
        self.log_step = param(log_step, ("inner",), "dynamics/dt")
        B = jax.nn.initializers.lecun_normal()(rngs.params(), (config.d_state, d_model))
        self.B = param(as_pairs(V.conj().T @ B), ("inner", "embed", None), "dynamics/B")
        sides = 2 if config.bidirectional else 1
        C = jnp.stack([_init_C(rngs.params(), d_model, V, config) for _ in range(sides)])
        self.C = param(C, (None, "embed", "inner", None), "dynamics/C")
        self.D = param(jax.random.normal(rngs.params(), (d_model,)), ("embed",), "dynamics/D")

        def dense(init: Initializer) -> Linear:
            return Linear(d_model, d_model, ("embed", None), rngs=rngs, use_bias=True, init=init)

        self.out = dense(out_init or init) if config.activation == "full_glu" else None
        self.gate = dense(init) if config.activation != "gelu" else None

    def init_state(self, batch: int, max_len: int) -> State:
        """Zeros [B, P, 2], real and imaginary parts; a bidirectional layer raises ValueError."""
        self._refuse_state()
        return jnp.zeros((batch, self.config.stored, 2))

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        if state is not None:
            self._refuse_state()
        s, after = self.system(x, ctx.carried(state), ctx.segment_ids)
        g = jax.nn.gelu(s, approximate=True)
        inner = ctx if ctx.key is None else ctx.with_key(jax.random.fold_in(ctx.key, 1))
        g = dropout(g, self.config.dropout, inner, tied=True)
        if self.gate is not None:
            value = s if self.config.activation == "half_glu2" else g
            value = value if self.out is None else self.out(value)
            g = value * jax.nn.sigmoid(self.gate(g))
        return g, None if state is None else after.astype(state.dtype)

    def system(
        self,
        u: Float[Array, "B L D"],
        state: Float[Array, "B P 2"] | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B P 2"]]:
        """s = 2 Re(C h) + D u in the dtype of ``u`` (Re without ``conj_sym``), and the state after it.

        A bidirectional layer adds the scan from the end; both read the current token.
        """
        c, wide = self.config, jnp.promote_types(u.dtype, jnp.float32)
        decay, gain = self._discrete()
        B, C = self.B[...], self.C[...]
        parts = (project(u, B[..., i].T).astype(wide) for i in (0, 1))
        b = gain * jax.lax.complex(*parts)

        def scan(reverse: bool, state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            return linear_scan(
                decay,
                b,
                initial_state=None if state is None else as_complex(state),
                segment_ids=segment_ids,
                reverse=reverse,
                implementation=c.implementation,
            )

        h, final = scan(False, state)
        s = _read(h, C[0], u.dtype)
        if c.bidirectional:
            s += _read(scan(True, None)[0], C[1], u.dtype)
        s = (2 * s if c.conj_sym else s) + self.D[...] * u.astype(wide)
        return s.astype(u.dtype), as_pairs(final)

    def log_eigenvalues(self) -> Complex[Array, "P 1"]:
        """Of the step from token to token (``layers.dynamics.TimeInvariant``); every state is a head."""
        return jnp.log(self._discrete()[0])[:, None]

    def response(self, length: int) -> Float[Array, "1 L"]:
        """Frobenius norm of K_l = Re(C Lambda_bar^l B_bar), doubled with ``conj_sym``: one head.

        |Re Z|^2 = (|Z|^2 + Re sum Z^2) / 2, which takes Gram matrices of C and B and no [D, D] matrix a lag.
        """
        decay, gain = self._discrete()
        C, B = as_complex(self.C[...])[0], gain[:, None] * as_complex(self.B[...])
        powers = decay ** jnp.arange(length)[:, None]
        sizes = [
            jnp.einsum("lp,pq,lq->l", powers, (C.T @ other_C) * (B @ other_B.T), other_powers).real
            for other_C, other_B, other_powers in ((C.conj(), B.conj(), powers.conj()), (C, B, powers))
        ]
        size = jnp.sqrt(jnp.maximum(sum(sizes), 0) / 2)
        return (2 if self.config.conj_sym else 1) * size[None]

    def _discrete(self) -> tuple[Complex[Array, " P"], Complex[Array, " P"]]:
        """Lambda_bar, and what B is multiplied by: zero-order hold or the bilinear transform."""
        Lambda = self.Lambda[...]
        if self.config.clip_eigs:
            Lambda = Lambda.at[:, 0].min(CLIP_EIGS)
        Lambda, dt = as_complex(Lambda), self.config.step_rescale * jnp.exp(self.log_step[...])
        if self.config.discretization == "zoh":
            decay = jnp.exp(Lambda * dt)
            return decay, (decay - 1) / Lambda
        half = Lambda * dt / 2
        return (1 + half) / (1 - half), dt / (1 - half)

    def _refuse_state(self) -> None:
        if self.config.bidirectional:
            raise ValueError(
                "s5.bidirectional=True reads from the end and cannot carry a state; feed whole sequences "
                "with state=None, or set s5.bidirectional=False."
            )

    def flops_per_token(self, length: int) -> float:
        """Two real products with B and with each C, 8 operations for a step of a complex state, the gate."""
        states, sides = self.config.stored, 2 if self.config.bidirectional else 1
        dense = sum(layer is not None for layer in (self.out, self.gate))
        return float(
            4 * self.d_model * states * (1 + sides) + 8 * states * sides + 2 * dense * self.d_model**2
        )


def spectrum(config: S5Config) -> tuple[Complex[np.ndarray, " P"], Complex[np.ndarray, "N P"]]:
    """Eigenvalues and eigenvectors of the block-diagonal HiPPO-LegS matrix without its low-rank part.

    N is ``d_state``; with ``conj_sym`` P = N / 2: of each pair the one with negative imaginary part.
    """
    Lambda, _, _, V = hippo.nplr("legs", config.d_state // config.blocks)
    if not config.conj_sym:
        Lambda = np.concatenate([Lambda, Lambda.conj()[::-1]])
        V = np.concatenate([V, V.conj()[:, ::-1]], axis=1)
    return np.tile(Lambda, config.blocks), np.kron(np.eye(config.blocks), V)


def _init_C(key: jax.Array, d_model: int, V: jax.Array, config: S5Config) -> Float[Array, "D P 2"]:
    if config.C_init == "complex_normal":
        return complex_normal(key, (d_model, V.shape[1]), 0.5)
    # The authors draw C row by row, or at once with the fan-in of a convolution over the features.
    rows = () if config.C_init == "lecun_normal" else (0,)
    init = jax.nn.initializers.lecun_normal(batch_axis=rows)
    return as_pairs(as_complex(init(key, (d_model, config.d_state, 2))) @ V)


def _read(h: Complex[Array, "B L P"], C: Float[Array, "D P 2"], dtype: jnp.dtype) -> Float[Array, "B L D"]:
    """Re(C h), multiplied in ``dtype``, in the width of ``h``."""
    real, imaginary = (project(t.astype(dtype), C[..., i].T) for i, t in enumerate((h.real, h.imag)))
    return real.astype(h.real.dtype) - imaginary.astype(h.real.dtype)
