"""The GPU kernels lower for CUDA from any host, forward and backward, at real shapes; what they refuse."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.causal_conv1d import causal_conv1d
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd

BF16, F32 = jnp.bfloat16, jnp.float32


def shape(*sizes, dtype=F32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def ssd_arguments(length=2048, heads=80, headdim=64, groups=1, d_state=128, dtype=BF16, **changes):
    """Mamba-2 2.7B unless changed."""
    by_token = (1, length, groups, d_state)
    return {
        "x": shape(1, length, heads, headdim, dtype=dtype),
        "dt": shape(1, length, heads),
        "A": shape(heads),
        "B": shape(*by_token, dtype=dtype),
        "C": shape(*by_token, dtype=dtype),
        "D": shape(heads),
        "initial_state": shape(1, heads, headdim, d_state),
        **changes,
    }


def conv_arguments(length=2048, channels=5376, width=4, dtype=BF16):
    return {
        "x": shape(1, length, channels, dtype=dtype),
        "weight": shape(width, channels),
        "bias": shape(channels),
        "initial_state": shape(1, width - 1, channels, dtype=dtype),
    }


def selective_arguments(length=2048, channels=5120, d_state=16, dtype=BF16):
    return {
        "x": shape(1, length, channels, dtype=dtype),
        "dt": shape(1, length, channels),
        "A": shape(channels, d_state),
        "B": shape(1, length, d_state, dtype=dtype),
        "C": shape(1, length, d_state, dtype=dtype),
        "initial_state": shape(1, channels, d_state),
    }


def linear_arguments(length=2048, channels=1024, dtype=jnp.complex64):
    by_token = shape(1, length, channels, dtype=dtype)
    return {"a": by_token, "b": by_token, "initial_state": shape(1, channels, dtype=dtype)}


def lower(op, arguments, **options) -> str:
    """Value and gradients of a named call, lowered for CUDA."""

    def loss(arguments, segment_ids):
        outputs = op(**arguments, segment_ids=segment_ids, implementation="pallas_gpu", **options)
        return sum(jnp.sum(t.real.astype(F32)) for t in outputs)

    first = next(iter(arguments.values()))
    segment_ids = shape(*first.shape[:2], dtype=jnp.int32)
    traced = jax.jit(jax.value_and_grad(loss)).trace(arguments, segment_ids)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "op, arguments, options, kernels",
    [
        (ssd, ssd_arguments(), {}, 3),
        (ssd, ssd_arguments(100, heads=4, headdim=128, groups=2, d_state=16), {}, 3),
        (causal_conv1d, conv_arguments(), {"activation": "silu"}, 2),
        (causal_conv1d, conv_arguments(19, 6, dtype=F32), {}, 2),
        (selective_scan, selective_arguments(), {}, 2),
        (linear_scan, linear_arguments(), {}, 2),
        (linear_scan, linear_arguments(1, 3, dtype=F32), {"reverse": True}, 2),
    ],
    ids=["ssd-2.7B", "ssd-tiny", "conv-2.7B", "conv-tiny", "selective-2.8B", "linear-complex", "linear-tiny"],
)
def test_lowers_for_cuda(op, arguments, options, kernels):
    assert lower(op, arguments, **options).count("stablehlo.custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize(
    "op, arguments, reason",
    [
        (ssd, ssd_arguments(64, dtype=F32), r"promote to float32.*cast all to bfloat16"),
        (ssd, ssd_arguments(64, B=shape(1, 64, 1, 128)), r"promote to float32"),
        (ssd, ssd_arguments(64, d_state=256), r"N = 256 is more than 128"),
        (causal_conv1d, conv_arguments(64, 8, width=20), r"K = 20 taps are more than 16"),
        (selective_scan, selective_arguments(64, 8, d_state=65), r"N = 65 is more than 64"),
    ],
)
def test_refuses_by_name(op, arguments, reason):
    with pytest.raises(ValueError, match=f"'pallas_gpu' cannot run this call: .*{reason}"):
        jax.eval_shape(lambda a: op(**a, implementation="pallas_gpu"), arguments)


def test_is_not_taken_unless_named():
    run = jax.jit(lambda a: ssd(**a)).trace(ssd_arguments(64))
    assert "mosaic_gpu" not in run.lower(lowering_platforms=("cuda",)).as_text()
