"""Switches on the SSD of a Mamba-2 layer, for a trained model or in training; all off by default."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.dynamics import Dynamics
from layers.prefix_scan import prefix_ssd
from layers.state_limits import capped_ssd, windowed_ssd
from layers.types import State
from pallas_kernels.ssd import ssd_core


@dataclasses.dataclass
class MitigationConfig:
    """What keeps a state from being overfilled, or lets it read a prefix both ways.

    The first four are Stuffed Mamba's (arXiv:2410.07145), without training; the last is Birdie's
    (arXiv:2411.01030), to train with.

    Attributes:
        decay_factor: of what is kept from token to token ("forget more"; the paper's is 0.9999).
        insert_factor: of what is written ("remember less"; 0.75).
        window: read only what the last ``window`` tokens wrote; None for all. The state carries the inputs of
            so many tokens.
        state_norm: bound on the Frobenius norm of each head's state, as a multiple of the largest in texts of
            the training length; None for none. One token at a time; needs ``python -m eval.calibrate``.
        bidirectional_prefix: the second half of the heads reads the prefix of a segment (``Context.prefix``)
            backward.
    """

    decay_factor: float = 1.0
    insert_factor: float = 1.0
    window: int | None = None
    state_norm: float | None = None
    bidirectional_prefix: bool = False

    @property
    def off(self) -> bool:
        """Whether the layer is as it is without this."""
        return self == MitigationConfig()

    @property
    def in_time(self) -> bool:
        """Whether the SSD needs its whole piece of time in order on one device."""
        return self.window is not None or self.state_norm is not None or self.bidirectional_prefix

    def validate(self, field: str) -> None:
        """Raises ValueError naming the first field, within ``field``, that cannot work."""
        if not 0 < self.decay_factor <= 1:
            raise ValueError(f"{field}.decay_factor={self.decay_factor} should lie in (0, 1]")
        if self.insert_factor <= 0:
            raise ValueError(f"{field}.insert_factor={self.insert_factor} should be positive")
        if self.window is not None and self.window < 1:
            raise ValueError(f"{field}.window={self.window} should be at least 1 token, or None")
        if self.state_norm is not None and self.state_norm <= 0:
            raise ValueError(f"{field}.state_norm={self.state_norm} should be positive, or None")
        chosen = {
            "window": self.window is not None,
            "state_norm": self.state_norm is not None,
            "bidirectional_prefix": self.bidirectional_prefix,
        }
        if sum(chosen.values()) > 1:
            names = " and ".join(f"{field}.{name}" for name, on in chosen.items() if on)
            raise ValueError(f"{names} are both set; each runs the SSD in its own way, so choose one")


def mitigated_ssd(
    dynamics: Dynamics,
    D: Float[Array, " H"],
    config: MitigationConfig,
    *,
    cap: Float[Array, " H"] | None,
    state: State | None,
    segment_ids: Int[Array, "B L"] | None,
    prefix: Bool[Array, "B L"] | None,
    chunk_size: int | None,
    implementation: str | None,
) -> tuple[Float[Array, "B L H P"], State]:
    """y_t = S_t C_t + D x_t of Mamba-2 with the switches of ``config``.

    Args:
        cap: bounds on the norms of the heads' states, with ``config.state_norm``.
        state: ``{"ssm"}``, and what ``empty_window`` has with ``config.window``; None for nothing before.
        prefix: of ``config.bidirectional_prefix``; None for nowhere.

    Returns:
        y in the dtype of x, and the state after the last token.
    """
    x, dt, A, B, C = dynamics
    u = (config.insert_factor * dt[..., None] * x.astype(dt.dtype)).astype(x.dtype)
    log_decay = dt * A[:, 0]
    if config.decay_factor != 1:  # a token with dt = 0 is skipped
        log_decay += jnp.where(dt > 0, math.log(config.decay_factor), 0)
    before = None if state is None else state["ssm"]
    options: dict = {"chunk_size": chunk_size, "implementation": implementation}
    more: dict = {}
    if config.window is not None:
        carried = None if state is None else {name: state[name] for name in ("behind", "recent")}
        y, final, more = windowed_ssd(
            u,
            log_decay,
            B,
            C,
            config.window,
            initial_state=before,
            carried=carried,
            segment_ids=segment_ids,
            **options,
        )
    elif cap is not None:
        y, final, _ = capped_ssd(u, log_decay, B, C, cap, initial_state=before, segment_ids=segment_ids)
    elif config.bidirectional_prefix:
        prefix = jnp.zeros(dt.shape[:2], bool) if prefix is None else prefix
        y, final = prefix_ssd(
            u, log_decay, B, C, prefix, initial_state=before, segment_ids=segment_ids, **options
        )
    else:
        y, final = ssd_core(u, log_decay, B, C, initial_state=before, segment_ids=segment_ids, **options)
    return y + (D[:, None] * x).astype(y.dtype), {"ssm": final, **more}
