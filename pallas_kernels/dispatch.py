"""Which implementation of an op runs.

``implementation=None`` takes the preference in the environment variable ``LONGSPAN_IMPLEMENTATION`` where
the op has it. Without one, a kernel written for a platform runs where the code is **lowered for** that
platform and the kernel takes the call; ``xla`` runs everywhere else. A name runs exactly that implementation,
or raises.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

PREFERENCE = "LONGSPAN_IMPLEMENTATION"
PORTABLE = "xla"
logger = logging.getLogger("longspan.kernels")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation that takes only some calls, or only one platform.

    Attributes:
        run: the function; same positional arguments as the op's other implementations.
        unsupported: of the same arguments, why ``run`` cannot take them (the rule, the value, what would
            work), or None.
        platform: "tpu" or "cuda" as in ``jax.jit(...).lower(lowering_platforms=...)``; None for any.
        unwise: of the same arguments, why ``implementation=None`` leaves a call that ``run`` could take to
            the portable implementation, or None.
        automatic: whether ``implementation=None`` takes it on its platform. A kernel for GPU is taken by name
            only until it has run on one, equal to its reference and faster than ``xla``.
    """

    run: Callable
    unsupported: Callable[..., str | None]
    platform: str | None = None
    automatic: bool = False
    unwise: Callable[..., str | None] | None = None

    def declined(self, *args) -> str | None:
        """Why ``implementation=None`` does not take it for a call on its platform, or None."""
        return self.unsupported(*args) or (self.unwise(*args) if self.unwise else None)


def unsuitable(
    arrays: Mapping[str, jax.Array], *dtypes: DTypeLike, advice: str = "cast it to one of them"
) -> str | None:
    """Why kernels that take ``dtypes`` cannot take one of ``arrays`` (by name in the call), or None."""
    names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
    for name, array in arrays.items():
        if array.dtype not in dtypes:
            return f"{name} is {array.dtype}, and the kernels take {names}; {advice}"
    return None


def resolve(op: str, implementation: str | None, available: Mapping[str, Callable | Kernel]) -> Callable:
    """The function to run for ``op``; it looks at the arguments it is called with (one device's part).

    Raises:
        ValueError: ``implementation`` is a name that ``op`` does not have. The returned function raises it
            for a named kernel that cannot take the call, and lowering for a platform that is not its own.
    """
    if implementation is not None:
        if implementation not in available:
            raise ValueError(
                f"{op}: implementation={implementation!r} does not exist; "
                f"use one of {sorted(available)} or None."
            )
        return _named(op, implementation, available[implementation])
    preferred = os.environ.get(PREFERENCE, "")
    portable = available[PORTABLE]
    assert not isinstance(portable, Kernel)
    if preferred in available:
        choice = available[preferred]
        return _or_portable(op, preferred, choice, portable) if isinstance(choice, Kernel) else choice
    kernels = {k: v for k, v in available.items() if isinstance(v, Kernel) and v.automatic}
    return functools.partial(_by_platform, op, kernels, portable) if kernels else portable


def _named(op: str, name: str, choice: Callable | Kernel) -> Callable:
    if not isinstance(choice, Kernel):
        return choice

    def run(*args):
        if reason := choice.unsupported(*args):
            raise ValueError(f"{op}: implementation={name!r} cannot run this call: {reason}. Or use 'xla'.")
        if choice.platform is None:
            return choice.run(*args)
        leaves, structure = jax.tree.flatten(args)
        marked = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array))
        leaves[marked] = _only_on(leaves[marked], op=op, name=name, platform=choice.platform)
        return choice.run(*jax.tree.unflatten(structure, leaves))

    return run


def _or_portable(op: str, name: str, kernel: Kernel, portable: Callable) -> Callable:
    def run(*args):
        if reason := kernel.unsupported(*args):
            _say_once(op, name, reason)
            return portable(*args)
        return kernel.run(*args)

    return run


def _by_platform(op: str, kernels: Mapping[str, Kernel], portable: Callable, *args):
    branches: dict[str, Callable] = {}
    for name, kernel in kernels.items():
        reason = kernel.declined(*args)
        if reason is None and kernel.platform is not None:
            branches[kernel.platform] = functools.partial(kernel.run, *args)
        elif reason is not None and kernel.platform == jax.default_backend().replace("gpu", "cuda"):
            _say_once(op, name, reason)
    if not branches:
        return portable(*args)
    return jax.lax.platform_dependent(**branches, default=functools.partial(portable, *args))


@functools.cache
def _say_once(op: str, name: str, reason: str) -> None:
    logger.warning("%s: 'xla' runs and not %r: %s.", op, name, reason)


# The identity, except that it lowers for one platform only: what a kernel named on the wrong platform raises.
_only_on_p = Primitive("only_on")


def _only_on(x: jax.Array, *, op: str, name: str, platform: str) -> jax.Array:
    return _only_on_p.bind(x, op=op, name=name, platform=platform)


@_only_on_p.def_abstract_eval
def _same(x, **_):
    return x


@_only_on_p.def_impl
def _run_alone(x, **params):
    return jax.jit(functools.partial(_only_on_p.bind, **params))(x)


def _lower(context, x, *, op: str, name: str, platform: str):
    platforms = context.module_context.platforms
    if tuple(platforms) != (platform,):
        raise ValueError(
            f"{op}: implementation={name!r} runs on {platform} only, and this program is compiled for "
            f"{', '.join(platforms)}. Use None to choose by platform, 'interpret' to run TPU kernels on any "
            "host, or 'xla'."
        )
    return [x]


mlir.register_lowering(_only_on_p, _lower)
ad.deflinear2(_only_on_p, lambda cotangent, _, **params: [cotangent])
batching.defvectorized(_only_on_p)
