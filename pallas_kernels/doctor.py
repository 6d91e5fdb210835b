"""Are the ops right on this machine, and what runs where: ``python -m pallas_kernels.doctor``.

Every op on a small input: each implementation that this host can run (TPU kernels in interpret mode included)
beside the reference, values and gradients; each kernel lowered for its platform; and for cpu, tpu and cuda
which implementation ``None`` gets, and why. Exits with 1 if anything differs or does not lower.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import PORTABLE, PREFERENCE, Kernel
from pallas_kernels.examples import Example, examples

REFERENCE = "reference"
PLATFORMS = ("cpu", "tpu", "cuda")
# How a kernel shows in a program lowered for its platform.
CUSTOM_CALLS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}
BAD = ("differs", "fails")


@dataclasses.dataclass(frozen=True)
class Check:
    """One implementation of one op.

    Attributes:
        status: "equal" (to the reference), "differs", "fails", "refuses" (it takes no example: ``note`` says
            why) or "elsewhere" (it runs on another platform).
        values, gradients: largest difference from the reference over the largest number there.
        seconds: both of them, compilation included.
        lowers: for its platform (forward and gradient): "" for an implementation that has none.
    """

    op: str
    implementation: str
    status: str
    example: str = ""
    values: float | None = None
    gradients: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    lowers: str = ""
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.status not in BAD and not self.lowers.startswith("no")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What ``implementation=None`` gets where a program is lowered for ``platform``, and why."""

    op: str
    example: str
    platform: str
    implementation: str
    why: str
    good: bool = True


def examine(ops: Sequence[str], note: Callable[[str], None]) -> tuple[list[Check], list[Choice]]:
    """All checks of the named ops (every op if none is named)."""
    by_op: dict[str, list[Example]] = {}
    for example in examples():
        if not ops or example.op in ops:
            by_op.setdefault(example.op, []).append(example)
    checks, choices = [], []
    with jax.default_matmul_precision("highest"):
        for op, calls in by_op.items():
            for name in calls[0].available:
                if name != REFERENCE:
                    note(f"{op}: {name}")
                    checks.append(check(name, calls))
            note(f"{op}: dispatch")
            choices += [choose(example, platform) for example in calls for platform in PLATFORMS]
    return checks, choices


def check(name: str, calls: Sequence[Example]) -> Check:
    """The implementation ``name`` on the first of ``calls`` that it takes."""
    op, kernel = calls[0].op, calls[0].available[name]
    if not isinstance(kernel, Kernel):
        return _compare(name, calls[0])
    refusals = [refusals_of(example)[name] for example in calls]
    taken = next((example for example, reason in zip(calls, refusals) if reason is None), None)
    if taken is None:
        return Check(op, name, "refuses", note=str(refusals[0]))
    if kernel.platform is None:
        return _compare(name, taken)
    lowers, why = _lowers(taken, name, kernel.platform)
    if kernel.platform == _here() and lowers:
        return dataclasses.replace(_compare(name, taken), lowers="yes")
    note = why or f"runs on {kernel.platform}, this is {_here()}"
    return Check(op, name, "elsewhere", taken.what, lowers="yes" if lowers else "no", note=note)


def choose(example: Example, platform: str) -> Choice:
    """What None gets, checked against the program lowered for ``platform``."""
    name, why = _explain(example, platform)
    place = (example.op, example.what, platform)
    kernel = example.available[name]
    if not isinstance(kernel, Kernel) or kernel.platform not in CUSTOM_CALLS:
        return Choice(*place, name, why)
    try:
        found = CUSTOM_CALLS[platform] in lowered(example, None, platform)
    except Exception as error:
        return Choice(*place, name, _first_line(error), good=False)
    return Choice(*place, name, why if found else "expected, but not in the lowered program", good=found)


def refusals_of(example: Example, *, automatic: bool = False) -> dict[str, str | None]:
    """By kernel, why it cannot take what the op hands to its implementations in this call, or None;
    ``automatic``: why None does not choose it."""
    found: dict[str, str | None] = {}
    kernels = {name: k for name, k in example.available.items() if isinstance(k, Kernel)}

    def ask(*args):
        for name, kernel in kernels.items():
            found[name] = kernel.declined(*args) if automatic else kernel.unsupported(*args)
        return example.available[PORTABLE](*args)

    if kernels:
        with _added(example.available, "doctor", ask):
            jax.eval_shape(lambda arrays: example.call(arrays, "doctor"), example.arguments)
    return found


def lowered(example: Example, implementation: str | None, platform: str) -> str:
    """The program of values and gradients, lowered for ``platform``."""
    step = jax.jit(functools.partial(_step, example, implementation))
    described = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), example.arguments)
    return step.trace(described).lower(lowering_platforms=(platform,)).as_text()


def _explain(example: Example, platform: str) -> tuple[str, str]:
    """What `dispatch.resolve` chooses for None, in words."""
    preferred, refusals = os.environ.get(PREFERENCE, ""), refusals_of(example, automatic=True)
    if preferred in example.available:
        reason = refusals.get(preferred)
        return (PORTABLE, f"{preferred}: {reason}") if reason else (preferred, f"${PREFERENCE}")
    kernels = {k: v for k, v in example.available.items() if isinstance(v, Kernel) and v.platform == platform}
    why = []
    for name, kernel in kernels.items():
        if kernel.automatic and refusals[name] is None:
            return name, "takes the call"
        untried = f"not yet run on hardware, so by name only: implementation={name!r}"
        why.append(f"{name}: {refusals[name]}" if refusals[name] else untried)
    return PORTABLE, "; ".join(why) or "no kernel for it"


def _compare(name: str, example: Example) -> Check:
    start = time.perf_counter()
    try:
        found = _run(example, name)
    except Exception as error:
        # A plain function has no way but raising to say that it does not take a call.
        refuses = name != PORTABLE and isinstance(error, ValueError)
        refuses = refuses and not isinstance(example.available[name], Kernel)
        status = "refuses" if refuses else "fails"
        return Check(example.op, name, status, example.what, note=_first_line(error))
    seconds = time.perf_counter() - start
    values, gradients = (_difference(a, b) for a, b in zip(found, _run(example, REFERENCE)))
    equal = max(values, gradients) <= example.tolerance  # False for NaN
    measured = (values, gradients, example.tolerance, seconds)
    return Check(example.op, name, "equal" if equal else "differs", example.what, *measured)


def _run(example: Example, implementation: str) -> tuple[Any, Any]:
    return jax.jit(functools.partial(_step, example, implementation))(example.arguments)


def _step(example: Example, implementation: str | None, arguments: dict[str, jax.Array]) -> tuple[Any, Any]:
    """Outputs, and gradients of all float arguments for a cotangent of the outputs that is no constant."""
    fixed = {k: v for k, v in arguments.items() if not jnp.issubdtype(v.dtype, jnp.inexact)}
    varied = {k: v for k, v in arguments.items() if k not in fixed}
    values, pull = jax.vjp(lambda varied: example.call(fixed | varied, implementation), varied)
    cotangents = jax.tree.map(
        lambda y: jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype), values
    )
    return values, pull(cotangents)[0]


def _difference(found: Any, expected: Any) -> float:
    """Over all arrays, the largest difference relative to the largest number of the expected array."""

    def one(a: jax.Array, b: jax.Array) -> float:
        wide = jnp.promote_types(b.dtype, jnp.float32)
        a, b = a.astype(wide), b.astype(wide)
        return float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30))

    return max(map(one, jax.tree.leaves(found), jax.tree.leaves(expected)))


def _lowers(example: Example, name: str, platform: str) -> tuple[bool, str]:
    """Whether the program has the kernel in it; if not, why."""
    try:
        text = lowered(example, name, platform)
    except Exception as error:
        return False, _first_line(error)
    found = CUSTOM_CALLS[platform] in text
    return found, "" if found else f"no {CUSTOM_CALLS[platform]} in the lowered program"


@contextlib.contextmanager
def _added(available: dict[str, Any], name: str, function: Callable) -> Iterator[None]:
    available[name] = function
    try:
        yield
    finally:
        del available[name]


def _here() -> str:
    return jax.default_backend().replace("gpu", "cuda")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def show(checks: Sequence[Check], choices: Sequence[Choice]) -> None:
    """Print two tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"equal": "green", "differs": "red", "fails": "red", "refuses": "yellow", "elsewhere": ""}
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file is as wide as the tables
    title = f"Implementations on this host ({_here()}, jax {jax.__version__}), beside the reference"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("op", "implementation", "", "values", "gradients", "at most", "s", "lowers", "note"):
        table.add_column(column)
    for c in checks:
        numbers = ("" if x is None else f"{x:.0e}" for x in (c.values, c.gradients, c.tolerance))
        seconds = "" if c.seconds is None else f"{c.seconds:.1f}"
        status = Text(c.status, colours[c.status])
        table.add_row(c.op, c.implementation, status, *numbers, seconds, c.lowers, Text(c.note or c.example))
    console.print(table)
    title = "What implementation=None gets, by the platform a program is lowered for"
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("op", "call", *PLATFORMS, "why"):
        table.add_column(column)
    for (op, call), row in _by_call(choices).items():
        reasons: dict[str, list[str]] = {}
        for choice in row:
            reasons.setdefault(choice.why, []).append(choice.platform)
        why = "; ".join(f"{', '.join(platforms)}: {reason}" for reason, platforms in reasons.items())
        gets = [Text(choice.implementation, "" if choice.good else "red") for choice in row]
        table.add_row(op, Text(call), *gets, Text(why))
    console.print(table)


def _by_call(choices: Sequence[Choice]) -> dict[tuple[str, str], list[Choice]]:
    rows: dict[tuple[str, str], list[Choice]] = {}
    for choice in choices:
        rows.setdefault((choice.op, choice.example), []).append(choice)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    names = list(dict.fromkeys(example.op for example in examples()))
    options = argparse.ArgumentParser("python -m pallas_kernels.doctor", allow_abbrev=False)
    options.add_argument("--ops", default="", help=f"some of {','.join(names)} (default all)")
    options.add_argument("--json", action="store_true", help="the same as JSON")
    given = options.parse_args(argv)
    ops = given.ops.split(",") if given.ops else []
    if unknown := sorted(set(ops) - set(names)):
        options.error(f"--ops: {unknown[0]!r} is unknown; use some of {','.join(names)}")
    checks, choices = examine(ops, lambda text: print(text, file=sys.stderr))
    good = all(c.good for c in checks) and all(c.good for c in choices)
    if given.json:
        found = {
            "good": good,
            "platform": _here(),
            "jax": jax.__version__,
            "checks": [dataclasses.asdict(c) for c in checks],
            "choices": [dataclasses.asdict(c) for c in choices],
        }
        print(json.dumps(found, indent=1))
    else:
        show(checks, choices)
        print("All equal, and what should lower lowers." if good else "NOT all right: see the rows in red.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
