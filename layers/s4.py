"""S4: a state-space layer with a diagonal-plus-low-rank transition (arXiv:2111.00396)."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float, Int

from layers import dplr, hippo
from layers.param import Initializer, param, uniform_fan_in
from layers.ssm_params import (
    DT_TRANSFORMS,
    as_complex,
    as_pairs,
    check_choice,
    check_paired,
    complex_normal,
    init_dt,
    shared_copies,
    step_sizes,
)
from layers.ssm_shell import LinearSSM, LinearSSMConfig
from layers.types import State
from pallas_kernels.lti_ssm import lti_ssm_dense

MIN_DECAY = 1e-4  # of the eigenvalues at initialisation, whose real part some measures have at 0


@dataclasses.dataclass
class S4Config(LinearSSMConfig):
    """Shape and initial dynamics of an S4 layer; see also ``LinearSSMConfig``.

    Attributes:
        measure: HiPPO matrix A starts as: "legs", "legt" (rank 2) or "fout".
        n_ssm: copies of (A, B, P) that the features share; None for one each.
        l_max: length of the kernel that is trained. Shorter sequences take its start; longer ones double it,
            as often as needed.
        dt_transform: "softplus" or "exp".
    """

    measure: str = "legs"
    n_ssm: int | None = None
    l_max: int = 1024
    dt_transform: str = "softplus"


class S4(LinearSSM):
    """A sequence mixer (``layers.types.SequenceMixer``); its state is [B, H, N], the parts [Re; Im] of N/2.

    As in the authors' code the read-out that is trained is C~ = C (I - A^l_max): the kernel needs no power of
    A then. The recurrence solves for C, with log2(l_max) products [N, N] a feature; XLA hoists that out of a
    decoding loop (seen on CPU), so it is paid once a call.

    Raises:
        ValueError: a field of the config that cannot work.
    """

    config: S4Config

    def __init__(
        self,
        d_model: int,
        config: S4Config,
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        copies = shared_copies("s4", config.n_ssm, d_model)
        check_paired("s4", config.d_state)
        check_choice("s4.measure", config.measure, hippo.MEASURES)
        check_choice("s4.dt_transform", config.dt_transform, DT_TRANSFORMS)
        if config.l_max < 1:
            raise ValueError(f"s4.l_max={config.l_max} must be at least 1, the length of the trained kernel")
        super().__init__(d_model, config, glu=True, rngs=rngs, init=init, out_init=out_init)
        Lambda, P, B, _ = hippo.nplr(config.measure, config.d_state)
        copied = "inner" if copies == d_model else None

        def tiled(x: np.ndarray) -> jax.Array:  # [.., M] -> [.., copies, M]
            x = np.repeat(x[..., None, :], copies, axis=-2)
            return as_pairs(jnp.asarray(x)) if np.iscomplexobj(x) else jnp.asarray(x, jnp.float32)

        decay = np.maximum(-Lambda.real, MIN_DECAY)
        self.A_real = param(tiled(np.log(decay)), (copied, "state"), "dynamics/A")
        self.A_imag = param(tiled(-Lambda.imag), (copied, "state"), "dynamics/A")
        self.P = param(tiled(P), (None, copied, "state", None), "dynamics/P")
        self.B = param(tiled(hippo.clip_B(B)), (copied, "state", None), "dynamics/B")
        inv_dt = init_dt(rngs.params(), d_model, config.dt_min, config.dt_max, config.dt_transform)
        self.inv_dt = param(inv_dt, ("inner",), "dynamics/dt")
        C = complex_normal(rngs.params(), (config.sides, d_model, config.d_state // 2), variance=0.5)
        A, _ = dplr.discretize(self.system())
        C_tilde = as_pairs(dplr.truncate(as_complex(C), A, config.l_max))
        self.C = param(C_tilde, (None, "inner", "state", None), "dynamics/C")

    def system(self) -> dplr.DPLR:
        """The continuous system and step size of every feature; feature h has copy h mod n_ssm."""
        repeats = self.d_model // self.A_real[...].shape[0]

        def of_features(x: jax.Array) -> jax.Array:
            return jnp.tile(x, (*[1] * (x.ndim - 2), repeats, 1))

        return dplr.DPLR(
            dt=step_sizes(self.inv_dt[...], self.config.dt_transform),
            Lambda=of_features(jax.lax.complex(-jnp.exp(self.A_real[...]), -self.A_imag[...])),
            P=of_features(as_complex(self.P[...])),
            B=of_features(as_complex(self.B[...])),
        )

    def kernel(self, length: int) -> Float[Array, "J H L"]:
        c, system, C_tilde = self.config, self.system(), as_complex(self.C[...])
        doublings = max(0, (length - 1) // c.l_max).bit_length()
        if doublings:
            C_tilde = dplr.double(C_tilde, dplr.discretize(system)[0], c.l_max, doublings)
        K = dplr.kernel(system, C_tilde, c.l_max << doublings, implementation=c.implementation)
        return K[..., :length]

    def recurrence(
        self,
        u: Float[Array, "B L H"],
        side: int,
        state: State | None,
        segment_ids: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L H"], State]:
        A, B = dplr.discretize(self.system())
        C = dplr.restore(as_complex(self.C[...]), A, self.config.l_max)
        return lti_ssm_dense(
            u,
            A,
            B,
            C[side],
            initial_state=state,
            segment_ids=segment_ids,
            reverse=side == 1,
            implementation=self.config.implementation,
        )

    def log_eigenvalues(self) -> Complex[Array, "H N"]:
        A, _ = dplr.discretize(self.system())
        # On the host: accelerators have no eigenvalues of matrices that are not symmetric.
        return jnp.asarray(np.log(np.linalg.eigvals(np.asarray(A)).astype(np.complex64)))

    def state_shape(self) -> tuple[int, ...]:
        return self.d_model, self.config.d_state
