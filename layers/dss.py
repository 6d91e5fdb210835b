"""DSS: diagonal state spaces with eigenvalues shared by all features (arXiv:2203.14343)."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Complex, Float, Int

from layers import hippo
from layers.param import Initializer, param, uniform_fan_in
from layers.ssm_params import as_complex, check_choice, complex_normal
from layers.ssm_shell import LinearSSM, LinearSSMConfig
from layers.types import State
from pallas_kernels.vandermonde import vandermonde

KERNELS = ("softmax", "exp", "exp-no-scale", "clip")
EPSILON = 1e-7  # under reciprocals, as in the authors' code
MAX_GROWTH = 1e-4  # of Re Lambda for "clip"


@dataclasses.dataclass
class DSSConfig(LinearSSMConfig):
    """Shape and initial dynamics of a DSS layer; see also ``LinearSSMConfig``.

    ``d_state`` counts complex states, which are not conjugate pairs.

    Attributes:
        kernel_type: "softmax" (DSS-softmax), "exp" (DSS-exp, Re Lambda < 0), "exp-no-scale" (without the
            factor of the zero-order hold) or "clip" (as "exp", with Re Lambda free up to 1e-4).
        sep_dt: a step size each for the real and the imaginary part of Lambda.
        max_kernel_length: L of the softmax kernel's normaliser, whatever the length of a sequence, so that
            pieces and wholes agree. No kernel is cut off at it.
    """

    kernel_type: str = "softmax"
    sep_dt: bool = True
    max_kernel_length: int = 1024


class Discrete(NamedTuple):
    """K_l = Re sum_n weights_n exp(l log_A_n), from l = max_kernel_length - 1 back where ``growing``."""

    log_A: Complex[Array, "H N"]
    weights: Complex[Array, "J H N"]
    growing: Bool[Array, "H N"]


class DSS(LinearSSM):
    """A sequence mixer (``layers.types.SequenceMixer``); its state is complex, as real pairs [B, H, N, 2].

    A softmax kernel may have growing modes (Re Lambda > 0), held small by its normaliser up to
    ``max_kernel_length``. Far beyond that they overflow, in the kernel and in a carried state.

    Raises:
        ValueError: a field of the config that cannot work.
    """

    config: DSSConfig

    def __init__(
        self,
        d_model: int,
        config: DSSConfig,
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        check_choice("dss.kernel_type", config.kernel_type, KERNELS)
        if config.max_kernel_length < 1:
            raise ValueError(f"dss.max_kernel_length={config.max_kernel_length} must be at least 1")
        super().__init__(d_model, config, glu=False, rngs=rngs, init=init, out_init=out_init)
        Lambda = hippo.nplr("legs", 2 * config.d_state)[0].conj()
        real = jnp.asarray(Lambda.real, jnp.float32)
        if config.kernel_type.startswith("exp"):
            real = jnp.log(-real)
        self.Lambda_re = param(real, ("state",), "dynamics/A")
        self.Lambda_im = param(jnp.asarray(Lambda.imag, jnp.float32), ("state",), "dynamics/A")
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        shape, axes = ((d_model, 2), ("inner", None)) if config.sep_dt else ((d_model,), ("inner",))
        log_dt = jax.random.uniform(rngs.params(), shape, jnp.float32, low, high)
        self.log_dt = param(log_dt, axes, "dynamics/dt")
        W = complex_normal(rngs.params(), (config.sides, d_model, config.d_state), variance=1.0)
        self.W = param(W, (None, "inner", "state", None), "dynamics/C")

    def Lambda(self) -> Complex[Array, " N"]:
        """Eigenvalues: free, at most 1e-4 in their real part ("clip"), or -exp(Lambda_re) in it ("exp")."""
        real, kind = self.Lambda_re[...], self.config.kernel_type
        if kind.startswith("exp"):
            real = -jnp.exp(real)
        elif kind == "clip":
            real = jnp.minimum(real, MAX_GROWTH)
        return jax.lax.complex(real, self.Lambda_im[...])

    def discrete(self) -> Discrete:
        """The system of every feature: log_A = dt Lambda, and W with the factor of the kernel type."""
        Lambda, W, kind = self.Lambda(), as_complex(self.W[...]), self.config.kernel_type
        dt = jnp.exp(self.log_dt[...])
        dt_re, dt_im = (dt[:, :1], dt[:, 1:]) if self.config.sep_dt else (dt[:, None], dt[:, None])
        log_A = jax.lax.complex(dt_re * Lambda.real, dt_im * Lambda.imag)
        growing = (log_A.real > 0) & (kind == "softmax")
        if kind == "softmax":  # W / Lambda softmax_l(l log_A), from the end where that is larger
            decaying = jnp.where(growing, -log_A, log_A)
            x = jnp.expm1(self.config.max_kernel_length * decaying) * Lambda
            W = W * jnp.expm1(decaying) * x.conj() / (jnp.abs(x) ** 2 + EPSILON)
        elif kind != "exp-no-scale":
            W = W * jnp.expm1(log_A) * Lambda.conj() / jnp.maximum(jnp.abs(Lambda) ** 2, EPSILON)
        return Discrete(log_A, W, growing)

    def kernel(self, length: int) -> Float[Array, "J H L"]:
        log_A, W, growing = self.discrete()
        how = {"implementation": self.config.implementation}
        if self.config.kernel_type != "softmax":
            return vandermonde(W, log_A, length, **how)
        # Growing modes are summed from the last lag back, so that every power taken is a decaying one. Few
        # layers ever have any, and without them there is half as much to compute.
        decaying = jnp.where(growing, -log_A, log_A)
        beyond = length - self.config.max_kernel_length

        def both(W: jax.Array, log_A: jax.Array, decaying: jax.Array) -> jax.Array:
            at_end = jnp.exp(beyond * log_A if beyond > 0 else -beyond * decaying)
            parts = jnp.stack([jnp.where(growing, 0, W), jnp.where(growing, W * at_end, 0)])
            forward, backward = vandermonde(parts, decaying, length, **how)
            return forward + backward[..., ::-1]

        def one(W: jax.Array, log_A: jax.Array, decaying: jax.Array) -> jax.Array:
            return vandermonde(W, decaying, length, **how)

        return jax.lax.cond(jnp.any(growing), both, one, W, log_A, decaying)

    def recurrence(
        self,
        u: Float[Array, "B L H"],
        side: int,
        state: State | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L H"], State]:
        log_A, W, growing = self.discrete()
        # A growing mode is scaled down where it enters, which keeps its state in range.
        scale = jnp.exp((1 - self.config.max_kernel_length) * jnp.where(growing, log_A, 0))
        return self._diagonal(u, log_A, scale, W[side], side, state, segment_ids)

    def log_eigenvalues(self) -> Complex[Array, "H N"]:
        return self.discrete().log_A

    def state_shape(self) -> tuple[int, ...]:
        return self.d_model, self.config.d_state, 2
