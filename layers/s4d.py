"""S4D: a state-space layer with a diagonal transition (arXiv:2206.11893)."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float, Int

from layers import hippo
from layers.param import Initializer, param, uniform_fan_in
from layers.ssm_params import (
    DT_TRANSFORMS,
    as_complex,
    check_choice,
    check_paired,
    complex_normal,
    init_dt,
    shared_copies,
    step_sizes,
)
from layers.ssm_shell import LinearSSM, LinearSSMConfig
from layers.types import State
from pallas_kernels.vandermonde import vandermonde

DISCRETIZATIONS = ("zoh", "bilinear")


@dataclasses.dataclass
class S4DConfig(LinearSSMConfig):
    """Shape and initial dynamics of an S4D layer; see also ``LinearSSMConfig``.

    Attributes:
        init_A: "lin", "inv", "inv2", "quad" or "legs": N/2 conjugate pairs; "real": N real states.
        discretization: "zoh" or "bilinear".
        n_ssm: copies of (A, B) that the features share; None for one each.
        dt_transform: "softplus" or "exp".
    """

    init_A: str = "lin"
    discretization: str = "zoh"
    n_ssm: int | None = None
    dt_transform: str = "softplus"

    @property
    def stored(self) -> int:
        """M: N/2, one of each conjugate pair, or N where states are real."""
        return self.d_state if self.init_A == "real" else self.d_state // 2


class Discrete(NamedTuple):
    """Transition exp(log_A) [H, M], input B [H, M], read-out C [J, H, M] with the factor 2 of the pairs."""

    log_A: Complex[Array, "H M"]
    B: Complex[Array, "H M"]
    C: Complex[Array, "J H M"]


class S4D(LinearSSM):
    """A sequence mixer (``layers.types.SequenceMixer``); its state is complex, as real pairs [B, H, M, 2].

    K_l = 2 Re sum_n C_n B_n exp(l dt A_n). The factor stays where states are real, as in the authors' code.

    Raises:
        ValueError: a field of the config that cannot work.
    """

    config: S4DConfig

    def __init__(
        self,
        d_model: int,
        config: S4DConfig,
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        copies, real = shared_copies("s4d", config.n_ssm, d_model), config.init_A == "real"
        if not real:
            check_paired("s4d", config.d_state)
        check_choice("s4d.init_A", config.init_A, hippo.DIAGONAL)
        check_choice("s4d.discretization", config.discretization, DISCRETIZATIONS)
        check_choice("s4d.dt_transform", config.dt_transform, DT_TRANSFORMS)
        super().__init__(d_model, config, glu=True, rngs=rngs, init=init, out_init=out_init)
        A, B = hippo.s4d_init(config.init_A, 2 * config.stored)
        copied = "inner" if copies == d_model else None

        def tiled(x: np.ndarray) -> jax.Array:
            return jnp.asarray(np.tile(x, (copies, 1)), jnp.float32)

        self.A_real = param(tiled(np.log(-A.real)), (copied, "state"), "dynamics/A")
        self.A_imag = None if real else param(tiled(-A.imag), (copied, "state"), "dynamics/A")
        pair = () if real else (None,)
        B_init = tiled(B.real) if real else jnp.stack([tiled(B.real), tiled(B.imag)], axis=-1)
        self.B = param(B_init, (copied, "state", *pair), "dynamics/B")
        inv_dt = init_dt(rngs.params(), d_model, config.dt_min, config.dt_max, config.dt_transform)
        self.inv_dt = param(inv_dt, ("inner",), "dynamics/dt")
        shape = (config.sides, d_model, config.stored)
        if real:
            C = jax.random.normal(rngs.params(), shape)
        else:
            C = complex_normal(rngs.params(), shape, variance=0.5)
        self.C = param(C, (None, "inner", "state", *pair), "dynamics/C")

    def discrete(self) -> Discrete:
        """The discrete system of every feature; feature h has copy h mod n_ssm."""
        decay = jnp.exp(self.A_real[...])
        frequency = jnp.zeros_like(decay) if self.A_imag is None else self.A_imag[...]
        number = as_complex if self.A_imag is not None else lambda x: x + 0j
        A = jax.lax.complex(-decay, -frequency)
        repeats = self.d_model // A.shape[0]
        A, B = (jnp.tile(x, (repeats, 1)) for x in (A, number(self.B[...])))
        dt = step_sizes(self.inv_dt[...], self.config.dt_transform)[:, None]
        if self.config.discretization == "zoh":
            log_A, B = dt * A, B * jnp.expm1(dt * A) / A
        else:
            half = dt * A / 2
            log_A, B = jnp.log((1 + half) / (1 - half)), B * dt / (1 - half)
        return Discrete(log_A, B, 2 * number(self.C[...]))

    def kernel(self, length: int) -> Float[Array, "J H L"]:
        log_A, B, C = self.discrete()
        return vandermonde(C * B, log_A, length, implementation=self.config.implementation)

    def recurrence(
        self,
        u: Float[Array, "B L H"],
        side: int,
        state: State | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L H"], State]:
        log_A, B, C = self.discrete()
        return self._diagonal(u, log_A, B, C[side], side, state, segment_ids)

    def log_eigenvalues(self) -> Complex[Array, "H N"]:
        return self.discrete().log_A

    def state_shape(self) -> tuple[int, ...]:
        return self.d_model, self.config.stored, 2
