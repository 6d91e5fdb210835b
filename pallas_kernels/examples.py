"""A small call of every op, or two where its kernels want other shapes: what the doctor runs and explains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention as attention_op
from pallas_kernels import cauchy as cauchy_op
from pallas_kernels import causal_conv1d as conv_op
from pallas_kernels import cca as cca_op
from pallas_kernels import linear_scan as linear_scan_op
from pallas_kernels import long_conv as long_conv_op
from pallas_kernels import lti_ssm as lti_op
from pallas_kernels import mamba2 as mamba2_op
from pallas_kernels import selective_scan as selective_scan_op
from pallas_kernels import ssd as ssd_op
from pallas_kernels import vandermonde as vandermonde_op

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Example:
    """One call.

    Attributes:
        op: name of the op.
        what: what is particular about the call.
        available: the op's dict of implementations.
        call: ``call(arguments, implementation)`` is the public function on ``arguments``.
        arguments: arrays by name.
    """

    op: str
    what: str
    available: dict[str, Any]
    call: Callable[[Arrays, str | None], Any]
    arguments: Arrays

    @property
    def tolerance(self) -> float:
        """Of a difference from the reference, over the largest number of the reference."""
        narrow = any(array.dtype == jnp.bfloat16 for array in self.arguments.values())
        return 3e-2 if narrow else 2e-4


def examples() -> Iterator[Example]:
    """All of them; of one op they follow each other."""
    yield _ssd("packed, state, tiny", 2, 21, 4, 2, 8, 16, jnp.float32, packed=True)
    yield _ssd("one document", 1, 256, 2, 1, 64, 128, jnp.bfloat16)
    yield _linear_scan("packed, state, tiny", 2, 21, 16, jnp.float32, packed=True)
    yield _linear_scan("one document", 1, 256, 128, jnp.float32)
    yield _selective_scan("packed, state, tiny", 2, 21, 16, 4, jnp.float32, packed=True)
    yield _selective_scan("one document", 1, 256, 128, 16, jnp.float32)
    yield _conv("packed, state, tiny", 2, 21, 16, jnp.float32, packed=True)
    yield _conv("one document", 1, 256, 128, jnp.bfloat16)
    yield _gated_ssd()
    yield _attention()
    yield _cca()
    yield from _lti()
    yield from _kernels()


class _Random:
    """The same numbers every time."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def normal(self, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(self._rng.normal(size=shape), dtype)

    def uniform(self, low: float, high: float, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.uniform(low, high, shape), jnp.float32)

    def complex(self, *shape: int) -> jax.Array:
        return self.normal(*shape) + 1j * self.normal(*shape)


def _segments(batch: int, length: int) -> jax.Array:
    """Padding first, then documents of 1, 2 and the remaining tokens, and padding at the end."""
    row = [0] * 2 + [1] + [2] * 2 + [3] * (length - 6) + [0]
    return jnp.asarray([row] * batch, jnp.int32)


def _example(op: str, what: str, module: Any, arguments: Mapping[str, jax.Array | None]) -> Example:
    """Of an op that takes its arguments by name."""
    given = {name: array for name, array in arguments.items() if array is not None}
    function = getattr(module, op)
    first = next(iter(given.values()))
    return Example(
        op,
        f"{what}, {first.dtype.name}",
        module.IMPLEMENTATIONS,
        lambda arrays, implementation: function(**arrays, implementation=implementation),
        given,
    )


def _ssd(what: str, b: int, length: int, h: int, g: int, p: int, n: int, dtype: Any, packed=False) -> Example:
    random = _Random()
    arguments = {
        "x": random.normal(b, length, h, p, dtype=dtype),
        "dt": random.uniform(0.01, 0.5, b, length, h),
        "A": -random.uniform(0.5, 4.0, h),
        "B": random.normal(b, length, g, n, dtype=dtype),
        "C": random.normal(b, length, g, n, dtype=dtype),
        "D": random.normal(h),
        "initial_state": random.normal(b, h, p, n),
        "segment_ids": _segments(b, length) if packed else None,
    }
    return _example("ssd", what, ssd_op, arguments)


def _linear_scan(what: str, b: int, length: int, d: int, dtype: Any, packed=False) -> Example:
    random = _Random()
    arguments = {
        "a": random.uniform(0.5, 1.0, b, length, d).astype(dtype),
        "b": random.normal(b, length, d, dtype=dtype),
        "initial_state": random.normal(b, d),
        "segment_ids": _segments(b, length) if packed else None,
    }
    return _example("linear_scan", what, linear_scan_op, arguments)


def _selective_scan(what: str, b: int, length: int, e: int, n: int, dtype: Any, packed=False) -> Example:
    random = _Random()
    arguments = {
        "x": random.normal(b, length, e, dtype=dtype),
        "dt": random.uniform(0.01, 0.5, b, length, e),
        "A": -random.uniform(0.5, 4.0, e, n),
        "B": random.normal(b, length, n, dtype=dtype),
        "C": random.normal(b, length, n, dtype=dtype),
        "D": random.normal(e),
        "initial_state": random.normal(b, e, n),
        "segment_ids": _segments(b, length) if packed else None,
    }
    return _example("selective_scan", what, selective_scan_op, arguments)


def _conv(what: str, b: int, length: int, c: int, dtype: Any, packed=False) -> Example:
    random, taps = _Random(), 4
    example = _example(
        "causal_conv1d",
        what,
        conv_op,
        {
            "x": random.normal(b, length, c, dtype=dtype),
            "weight": random.normal(taps, c),
            "bias": random.normal(c),
            "initial_state": random.normal(b, taps - 1, c, dtype=dtype),
            "segment_ids": _segments(b, length) if packed else None,
        },
    )
    call = lambda arrays, implementation: conv_op.causal_conv1d(  # noqa: E731
        **arrays, activation="silu", implementation=implementation
    )
    return dataclasses.replace(example, call=call)


def _gated_ssd() -> Example:
    random, (b, length, h, p, g, n, taps) = _Random(), (2, 21, 4, 8, 2, 16, 4)
    sizes = {"x": h * p, "B": g * n, "C": g * n}
    arguments = {name: random.normal(b, length, size) for name, size in sizes.items()}
    arguments |= {f"conv_{name}": random.normal(taps, size) for name, size in sizes.items()}
    arguments |= {f"bias_{name}": random.normal(size) for name, size in sizes.items()}
    arguments |= {f"state_{name}": random.normal(b, taps - 1, size) for name, size in sizes.items()}
    arguments |= {
        "z": random.normal(b, length, h * p),
        "dt": random.normal(b, length, h),
        "dt_bias": random.normal(h),
        "A": -random.uniform(0.5, 4.0, h),
        "D": random.normal(h),
        "norm": random.normal(h * p),
        "initial_state": random.normal(b, h, p, n),
        "segment_ids": _segments(b, length),
    }

    def call(arrays: Arrays, implementation: str | None) -> Any:
        conv = {name: (arrays[f"conv_{name}"], arrays[f"bias_{name}"]) for name in sizes}
        weights = [arrays[name] for name in ("dt_bias", "A", "D", "norm")]
        return mamba2_op.gated_ssd(
            mamba2_op.Inputs(*(arrays[name] for name in ("z", "x", "B", "C", "dt"))),
            mamba2_op.Weights(conv, *weights),
            mamba2_op.Form(n_groups=g),
            conv_state={name: arrays[f"state_{name}"] for name in sizes},
            initial_state=arrays["initial_state"],
            segment_ids=arrays["segment_ids"],
            implementation=implementation,
        )

    return Example("gated_ssd", "packed, state, tiny, float32", mamba2_op.IMPLEMENTATIONS, call, arguments)


def _attention() -> Example:
    random = _Random()
    arguments = {
        "q": random.normal(2, 21, 4, 8),
        "k": random.normal(2, 21, 2, 8),
        "v": random.normal(2, 21, 2, 8),
        "segment_ids": _segments(2, 21),
    }

    def call(arrays: Arrays, implementation: str | None) -> Any:
        ids = arrays["segment_ids"]
        source = attention_op.Source(
            arrays["k"], arrays["v"], kv_segment_ids=ids, mask=attention_op.Mask(causal=True)
        )
        return attention_op.attention(
            arrays["q"], [source], q_segment_ids=ids, return_lse=True, implementation=implementation
        )

    what = "causal, packed, grouped queries, float32"
    return Example("attention", what, attention_op.IMPLEMENTATIONS, call, arguments)


def _cca() -> Example:
    random = _Random()
    kv = (2, 45, 2, 16)
    arguments = {
        "q": random.normal(2, 45, 4, 16),
        "k": random.normal(*kv),
        "v": random.normal(*kv),
        "segment_ids": _segments(2, 45),
    }

    def call(a: Arrays, implementation: str | None) -> Any:
        return cca_op.core_context_attention(
            a["q"],
            a["k"],
            a["v"],
            group_size=4,
            window=8,
            segment_ids=a["segment_ids"],
            implementation=implementation,
        )

    what = "grouped heads, packed, float32"
    return Example("core_context_attention", what, cca_op.IMPLEMENTATIONS, call, arguments)


def _lti() -> Iterator[Example]:
    random, (b, length, h, n) = _Random(), (2, 21, 4, 4)
    shared = {"u": random.normal(b, length, h), "segment_ids": _segments(b, length)}
    diagonal = {
        "log_A": -random.uniform(0.01, 0.5, h, n) + 1j * random.uniform(0.0, 3.0, h, n),
        "B": random.complex(h, n),
        "C": random.complex(h, n),
        "initial_state": random.complex(b, h, n),
    }
    yield _example("lti_ssm", "packed, state, tiny", lti_op, shared | diagonal)
    dense = {
        "A": 0.3 * random.normal(h, n, n),
        "B": random.normal(h, n),
        "C": random.normal(h, n),
        "initial_state": random.normal(b, h, n),
    }
    example = _example("lti_ssm_dense", "packed, state, tiny", lti_op, shared | dense)
    yield dataclasses.replace(example, available=lti_op.DENSE_IMPLEMENTATIONS)


def _kernels() -> Iterator[Example]:
    """Convolution kernels and convolutions."""
    random, (h, n, length) = _Random(), (4, 4, 21)
    poles = -random.uniform(0.01, 0.5, h, n) + 1j * random.uniform(0.0, 3.0, h, n)
    coefficients = random.complex(h, n)
    powers = _example("vandermonde", "tiny", vandermonde_op, {"coefficients": coefficients, "log_A": poles})
    yield dataclasses.replace(
        powers,
        call=lambda arrays, implementation: vandermonde_op.vandermonde(
            **arrays, length=length, implementation=implementation
        ),
    )
    omega = jnp.exp(2j * jnp.pi * jnp.arange(length) / length)
    arguments = {"v": coefficients, "omega": omega, "lam": poles}
    yield _example("cauchy", "tiny", cauchy_op, arguments)
    arguments = {"u": random.normal(2, length, h), "k": random.normal(h, length), "skip": random.normal(h)}
    yield _example("long_conv", "tiny", long_conv_op, arguments)
