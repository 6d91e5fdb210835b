"""Which implementation of an op runs.

``implementation=None`` takes the preference in the environment variable ``LONGSPAN_IMPLEMENTATION`` where
the op has it, and the op's default otherwise. A name runs exactly that implementation, or raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

PREFERENCE = "LONGSPAN_IMPLEMENTATION"


def resolve(
    op: str, implementation: str | None, available: Mapping[str, Callable], default: str = "xla"
) -> Callable:
    """The function to run for ``op``.

    Raises:
        ValueError: ``implementation`` is a name that ``op`` does not have.
    """
    if implementation is None:
        preferred = os.environ.get(PREFERENCE, "")
        return available[preferred if preferred in available else default]
    if implementation not in available:
        raise ValueError(
            f"{op}: implementation={implementation!r} does not exist; use one of {sorted(available)} or None."
        )
    return available[implementation]
