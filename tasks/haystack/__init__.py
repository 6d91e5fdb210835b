"""Needles in text: prompts that hide facts in noise and ask for them; one generator a task.

Each is pure in what `tasks.haystack.types.Request` draws from; keys and values of training never occur in
evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tasks.haystack import babi, niah, passkey, ruler
from tasks.haystack.types import Request, Sample

GENERATORS: Mapping[str, Callable[[Request], Sample]] = {
    **passkey.GENERATORS,
    **niah.GENERATORS,
    **ruler.GENERATORS,
    **babi.GENERATORS,
}
"""By name: the styles of passkey, RULER's tasks, bAbI's qa1 to qa3."""
