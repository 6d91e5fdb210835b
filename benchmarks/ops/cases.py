"""The calls that are timed: for every op its inputs, its work, and shapes for a CPU and for an accelerator.

``pallas_kernels`` is imported when a call is made, never with this file: a process may have chosen the one of
another commit (`benchmarks.ops.against`).
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.chips import Work

Shape = Mapping[str, int]
Arrays = dict[str, Any]
FORWARD, BOTH = "forward", "forward and backward"
WHAT = (FORWARD, BOTH)


@dataclasses.dataclass(frozen=True)
class Input:
    """An argument: normal numbers, or uniform ones between ``low`` and ``high``; complex if ``phase`` is."""

    shape: tuple[int, ...]
    dtype: str
    low: float | None = None
    high: float | None = None

    def make(self, rng: np.random.Generator) -> np.ndarray:
        """Numbers drawn from ``rng``."""

        def draw() -> np.ndarray:
            if self.low is None or self.high is None:
                return rng.standard_normal(self.shape, np.float32)
            return rng.uniform(self.low, self.high, self.shape).astype(np.float32)

        values = draw() if self.dtype != "complex64" else draw() + 1j * rng.uniform(0, 3, self.shape)
        return values.astype(jnp.dtype(self.dtype))


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an op, by axis letters.

    ``shape`` of SSD holds Q too, the chunk that its FLOPs are counted with.
    """

    op: str
    shape: Shape
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.op} {' '.join(f'{k}={n}' for k, n in self.shape.items())} {self.dtype}"

    @property
    def inputs(self) -> dict[str, Input]:
        """The op's arguments by name."""
        return OPS[self.op].inputs(self.shape, self.dtype)

    def arrays(self) -> dict[str, np.ndarray]:
        """The same numbers for everyone."""
        rng = np.random.default_rng(0)
        return {name: given.make(rng) for name, given in self.inputs.items()}

    def described(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Their shapes and dtypes alone."""
        return {name: jax.ShapeDtypeStruct(i.shape, jnp.dtype(i.dtype)) for name, i in self.inputs.items()}

    def call(self, arrays: Arrays, implementation: str | None) -> Any:
        """The op's outputs; y, or y first."""
        op = OPS[self.op]
        module = importlib.import_module(f"pallas_kernels.{op.folder or self.op}")
        return op.call(module, arrays, self.shape, implementation)

    def work(self, what: str) -> Work:
        """Bytes: every input and output once; backward also every input again, cotangent and gradient.

        What the forward may leave for the backward (SSD's chunk states) is not counted: it can be recomputed.
        """
        op, given = OPS[self.op], _bytes(self.described())
        out = _bytes(jax.eval_shape(lambda arrays: self.call(arrays, "xla"), self.described()))
        forward = Work(op.flops(self.shape), given + out)
        if what == FORWARD:
            return forward
        return forward + Work(op.backward_flops(self.shape), 2 * given + out)


@dataclasses.dataclass(frozen=True)
class Op:
    """How an op is called, and the floating point operations of a call.

    Attributes:
        call: ``call(module, arrays, shape, implementation)``.
        flops: forward. backward_flops: of the gradients alone.
        folder: in ``pallas_kernels``, if it is not the name of the op.
    """

    inputs: Callable[[Shape, str], dict[str, Input]]
    call: Callable[[Any, Arrays, Shape, str | None], Any]
    flops: Callable[[Shape], float]
    backward_flops: Callable[[Shape], float]
    folder: str = ""


def step(function: Callable[[Arrays], Any], what: str) -> Callable[[Arrays], Any]:
    """``function`` itself, or its values and the gradients of all its inputs, for cotangents of one."""

    def both(arrays: Arrays) -> Any:
        values, pull = jax.vjp(function, arrays)
        return values, pull(jax.tree.map(jnp.ones_like, values))

    return function if what == FORWARD else both


def _bytes(tree: Any) -> float:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _ssd_inputs(s: Shape, dtype: str) -> dict[str, Input]:
    return {
        "x": Input((s["B"], s["L"], s["H"], s["P"]), dtype),
        "dt": Input((s["B"], s["L"], s["H"]), "float32", 1e-3, 0.1),
        "A": Input((s["H"],), "float32", -16.0, -1.0),
        "B": Input((s["B"], s["L"], s["G"], s["N"]), dtype),
        "C": Input((s["B"], s["L"], s["G"], s["N"]), dtype),
        "D": Input((s["H"],), "float32"),
    }


def _ssd_flops(s: Shape) -> float:
    Q, N, G, P, H = (s[k] for k in "QNGPH")
    return s["B"] * s["L"] * (2 * Q * N * G + 2 * Q * P * H + 4 * N * P * H)


def _ssd_backward(s: Shape) -> float:
    Q, N, G, P, H = (s[k] for k in "QNGPH")
    return s["B"] * s["L"] * (6 * Q * N * G + 4 * Q * P * H + 10 * N * P * H)


def _selective_inputs(s: Shape, dtype: str) -> dict[str, Input]:
    return {
        "x": Input((s["B"], s["L"], s["E"]), dtype),
        "dt": Input((s["B"], s["L"], s["E"]), "float32", 1e-3, 0.1),
        "A": Input((s["E"], s["N"]), "float32", -16.0, -1.0),
        "B": Input((s["B"], s["L"], s["N"]), dtype),
        "C": Input((s["B"], s["L"], s["N"]), dtype),
        "D": Input((s["E"],), "float32"),
    }


def _conv_inputs(s: Shape, dtype: str) -> dict[str, Input]:
    x = Input((s["B"], s["L"], s["C"]), dtype)
    return {"x": x, "weight": Input((s["K"], s["C"]), dtype), "bias": Input((s["C"],), dtype)}


def _attention(module: Any, arrays: Arrays, shape: Shape, implementation: str | None) -> Any:
    source = module.Source(arrays["k"], arrays["v"], mask=module.Mask(causal=True))
    return module.attention(arrays["q"], [source], implementation=implementation)


def _by_name(op: str, *given: str) -> Callable[[Any, Arrays, Shape, str | None], Any]:
    """Calls an op with its arrays by name; ``given`` are arguments taken from the shape."""

    def call(module: Any, arrays: Arrays, shape: Shape, implementation: str | None) -> Any:
        sizes = {name: shape[name[0].upper()] for name in given}
        return getattr(module, op)(**arrays, **sizes, implementation=implementation)

    return call


def _conv(module: Any, arrays: Arrays, shape: Shape, implementation: str | None) -> Any:
    return module.causal_conv1d(**arrays, activation="silu", implementation=implementation)


def _fft_flops(s: Shape) -> float:
    """Of three real FFTs of twice the length, for each row and channel."""
    return s["B"] * s["H"] * 3 * 2.5 * 2 * s["L"] * math.log2(2 * s["L"])


def _elements(*axes: str) -> Callable[[Shape], float]:
    return lambda s: math.prod(s[axis] for axis in axes)


def _times(factor: float, of: Callable[[Shape], float]) -> Callable[[Shape], float]:
    return lambda s: factor * of(s)


def _modes(s: Shape) -> dict[str, Input]:
    """Decaying complex modes."""
    return {"log_A": Input((s["H"], s["N"]), "complex64", -0.5, -0.001)}


_TOKENS_STATES = _elements("B", "L", "E", "N")
_TAPS = _elements("B", "L", "C", "K")
_PAIRS = _elements("B", "L", "L", "H", "E")
_POWERS = _elements("H", "N", "L")
OPS: dict[str, Op] = {
    "ssd": Op(_ssd_inputs, _by_name("ssd"), _ssd_flops, _ssd_backward),
    "linear_scan": Op(
        lambda s, dtype: {
            "a": Input((s["B"], s["L"], s["D"]), dtype, 0.9, 1.0),
            "b": Input((s["B"], s["L"], s["D"]), dtype),
        },
        _by_name("linear_scan"),
        _times(2, _elements("B", "L", "D")),
        _times(3, _elements("B", "L", "D")),
    ),
    # Nine operations for each token, channel and state, an exponential counted as one.
    "selective_scan": Op(
        _selective_inputs, _by_name("selective_scan"), _times(9, _TOKENS_STATES), _times(18, _TOKENS_STATES)
    ),
    "causal_conv1d": Op(_conv_inputs, _conv, _times(2, _TAPS), _times(4, _TAPS)),
    # Causal: half of the pairs.
    "attention": Op(
        lambda s, dtype: {name: Input((s["B"], s["L"], s["H"], s["E"]), dtype) for name in "qkv"},
        _attention,
        _times(2, _PAIRS),
        _times(5, _PAIRS),
    ),
    "long_conv": Op(
        lambda s, dtype: {
            "u": Input((s["B"], s["L"], s["H"]), dtype),
            "k": Input((s["H"], s["L"]), "float32"),
        },
        _by_name("long_conv"),
        _fft_flops,
        _times(2, _fft_flops),
    ),
    # The recurrence itself: a complex multiply-add, the input's and the output's share.
    "lti_ssm": Op(
        lambda s, dtype: {
            "u": Input((s["B"], s["L"], s["H"]), dtype),
            **_modes(s),
            **{name: Input((s["H"], s["N"]), "complex64", -1.0, 1.0) for name in "BC"},
        },
        _by_name("lti_ssm"),
        _times(16, _elements("B", "L", "H", "N")),
        _times(32, _elements("B", "L", "H", "N")),
    ),
    # A complex power and a complex multiply-add.
    "vandermonde": Op(
        lambda s, dtype: {"coefficients": Input((s["H"], s["N"]), "complex64", -1.0, 1.0), **_modes(s)},
        _by_name("vandermonde", "length"),
        _times(10, _POWERS),
        _times(20, _POWERS),
    ),
    # Two complex quotients and sums.
    "cauchy": Op(
        lambda s, dtype: {
            "v": Input((s["H"], s["N"]), "complex64", -1.0, 1.0),
            "omega": Input((s["L"],), "complex64", 0.5, 1.0),
            "lam": _modes(s)["log_A"],
        },
        _by_name("cauchy"),
        _times(26, _POWERS),
        _times(52, _POWERS),
    ),
}

CPU: tuple[Case, ...] = (
    Case("ssd", {"B": 1, "L": 2048, "H": 24, "P": 64, "N": 128, "G": 1, "Q": 128}),
    *(Case("linear_scan", {"B": 1, "L": 4**n, "D": 64}) for n in range(4, 9)),
    Case("selective_scan", {"B": 1, "L": 2048, "E": 768, "N": 16}),
    Case("causal_conv1d", {"B": 1, "L": 4096, "C": 1792, "K": 4}),
    Case("attention", {"B": 1, "L": 2048, "H": 8, "E": 64}),
    Case("long_conv", {"B": 4, "L": 4096, "H": 256}),
    Case("lti_ssm", {"B": 4, "L": 4096, "H": 64, "N": 32}),
    Case("vandermonde", {"H": 256, "N": 32, "L": 4096}),
    Case("cauchy", {"H": 256, "N": 32, "L": 4096}),
)
CPU_QUICK: tuple[Case, ...] = (
    Case("ssd", {"B": 1, "L": 1024, "H": 8, "P": 64, "N": 128, "G": 1, "Q": 128}),
    *(Case("linear_scan", {"B": 1, "L": length, "D": 64}) for length in (256, 4096, 65536)),
    Case("selective_scan", {"B": 1, "L": 512, "E": 256, "N": 16}),
    Case("causal_conv1d", {"B": 1, "L": 1024, "C": 768, "K": 4}),
    Case("attention", {"B": 1, "L": 512, "H": 4, "E": 64}),
)
_MAMBA2 = {"130M": (24, 64, 128, 1), "2.7B": (80, 64, 128, 1), "8B": (128, 64, 128, 8)}  # H, P, N, G
ACCELERATOR: tuple[Case, ...] = (
    *(
        Case("ssd", {"B": 1, "L": 8192, "H": H, "P": P, "N": N, "G": G, "Q": 128}, "bfloat16")
        for H, P, N, G in _MAMBA2.values()
    ),
    Case("linear_scan", {"B": 1, "L": 8192, "D": 2560}),
    Case("selective_scan", {"B": 1, "L": 2048, "E": 1536, "N": 16}, "bfloat16"),
    Case("selective_scan", {"B": 1, "L": 2048, "E": 5120, "N": 16}, "bfloat16"),
    Case("causal_conv1d", {"B": 1, "L": 8192, "C": 5376, "K": 4}, "bfloat16"),
    Case("attention", {"B": 1, "L": 8192, "H": 20, "E": 128}, "bfloat16"),
    Case("long_conv", {"B": 16, "L": 4096, "H": 256}),
)
ACCELERATOR_QUICK = tuple(
    case for case in ACCELERATOR if case.shape.get("H") == 24 or case.op in ("linear_scan", "causal_conv1d")
)
