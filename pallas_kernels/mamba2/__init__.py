"""All of a Mamba-2 layer between its projections: convolution, SSD, gated norm (arXiv:2405.21060)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import spmd
from pallas_kernels.dispatch import Kernel, resolve
from pallas_kernels.mamba2 import tpu, unfused
from pallas_kernels.mamba2.form import Form, Inputs, Weights

__all__ = ["Form", "Inputs", "Weights", "gated_ssd"]

IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": functools.partial(unfused.gated_ssd, implementation="reference"),
    "xla": functools.partial(unfused.gated_ssd, implementation="xla"),
    "pallas_tpu": Kernel(tpu.gated_ssd, tpu.unsupported, "tpu", automatic=True, unwise=tpu.unwise),
    "interpret": Kernel(
        functools.partial(tpu.gated_ssd, interpret=True), functools.partial(tpu.unsupported, interpret=True)
    ),
    "pallas_gpu": functools.partial(unfused.gated_ssd, implementation="pallas_gpu"),
}
NOTHING: dict[str, None] = {"x": None, "B": None, "C": None}


def gated_ssd(
    inputs: Inputs,
    weights: Weights,
    form: Form,
    *,
    conv_state: Mapping[str, Float[Array, "B _ _"] | None] | None = None,
    initial_state: Float[Array, "B H P N"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L E"], dict[str, Float[Array, "B _ _"]], Float[Array, "B H P N"]]:
    """y = norm(SSD(silu(conv(x, B, C)), softplus(dt + bias)) * silu(z)); without a norm, what it is of.

    Args:
        inputs, weights, form: see ``mamba2/form.py``.
        conv_state: by name, the K-1 raw inputs before the first real token, newest last; zero when None.
        initial_state: state of the SSD before the first real token; zero when None.
        segment_ids: 0 is padding, which changes nothing and whose output is 0; any other change of id resets
            the convolution and the state. None means neither.
        implementation: "reference", "xla", "pallas_tpu", "interpret", "pallas_gpu" (a kernel for each op), or
            None to choose.

    Under an active mesh rows are split over (data, fsdp); if heads or time are split too, the ops run one by
    one, each sharded by itself.

    Returns:
        y in the dtype of ``inputs.x``; the new ``conv_state`` ("x", "B", "C"); the final state, float32 or
        wider. All are differentiable in every float input.

    Raises:
        ValueError: sizes that do not fit together; what ``causal_conv1d`` and ``ssd`` raise.
    """
    _check(inputs, weights, form)
    args = (inputs, weights, dict(conv_state or NOTHING), initial_state, segment_ids, form)
    # Where nothing fused runs, each op of the chain chooses for itself.
    each = functools.partial(unfused.gated_ssd, implementation=implementation)
    mesh = spmd.active_mesh()
    if mesh is not None:
        alone = mesh.shape[spmd.TENSOR] == mesh.shape[spmd.SEQUENCE] == 1
        batch = spmd.axes_dividing(mesh, spmd.BATCH, inputs.x.shape[0])
        return _over_rows(implementation, mesh, batch, args) if alone and batch else each(*args)
    available = IMPLEMENTATIONS | ({"xla": each} if implementation is None else {})
    return resolve("gated_ssd", implementation, available)(*args)


def _over_rows(implementation: str | None, mesh, batch, args):
    """Every device its own rows."""
    inputs, weights, conv_state, initial_state, segment_ids, form = args
    rows, whole = PartitionSpec(batch), PartitionSpec()

    def device(inputs, weights, conv_state, initial_state, segment_ids):
        return gated_ssd(
            inputs,
            weights,
            form,
            conv_state=conv_state,
            initial_state=initial_state,
            segment_ids=segment_ids,
            implementation=implementation,
        )

    return jax.shard_map(
        device, mesh=mesh, in_specs=(rows, whole, rows, rows, rows), out_specs=rows, check_vma=False
    )(inputs, weights, conv_state, initial_state, segment_ids)


def _check(inputs: Inputs, weights: Weights, form: Form) -> None:
    """What the ops of the chain do not check themselves."""
    (_, _, channels), heads, states = inputs.x.shape, inputs.dt.shape[-1], inputs.B.shape[-1]
    if inputs.z.shape != inputs.x.shape:
        raise ValueError(f"gated_ssd: z has shape {inputs.z.shape}; expected that of x, {inputs.x.shape}.")
    if channels % heads:
        raise ValueError(f"gated_ssd: x has {channels} channels, not a multiple of the {heads} heads of dt.")
    if states % form.n_groups or channels % form.n_groups:
        raise ValueError(
            f"gated_ssd: n_groups = {form.n_groups} does not divide the {states} channels of B "
            f"and the {channels} of x."
        )
    for name, t in (("dt_bias", weights.dt_bias), ("norm", weights.norm)):
        size = heads if name == "dt_bias" else channels
        if t is not None and t.shape != (size,):
            raise ValueError(f"gated_ssd: {name} has shape {t.shape}; expected ({size},).")
