"""How numbers and names are put into words on a page. Missing values are said to be missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.groups import Statistic

MISSING = "not recorded"
GLUE = "\N{NO-BREAK SPACE}"  # between a number and its unit

# Of result.json's "reference/NAME": what the same split takes by simple means.
REFERENCES = {
    "ngram_order_2": "order-2 n-gram",
    "ngram_order_3": "order-3 n-gram",
    "xz": "xz -9, validation alone",
    "xz_primed": "xz -9, primed with training text",
}

METRICS = {"bits_per_byte": "bits per byte", "loss": "nats per token"}


def count(value: float | None) -> str:
    """A number of things: 950, 12.3 k, 0.65 M, 8.66 G."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "G"), (1e5, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.3g}{GLUE}{unit}"
    return f"{value:,.0f}"


def plus_minus(statistic: Statistic | None, digits: int = 3) -> str:
    """The mean, with the standard deviation where there are several values."""
    if statistic is None:
        return MISSING
    if not math.isfinite(statistic.mean):
        return f"not finite ({', '.join(f'{v:.{digits}f}' for v in statistic.values)})"
    mean = f"{statistic.mean:.{digits}f}"
    return mean if statistic.sd is None else f"{mean}{GLUE}±{GLUE}{statistic.sd:.{digits}f}"


def significant(statistic: Statistic | None, digits: int = 4) -> str:
    """As :func:`plus_minus`, for quantities of any size."""
    if statistic is None:
        return MISSING
    if all(value.is_integer() for value in statistic.values) and len(set(statistic.values)) == 1:
        return f"{statistic.mean:,.0f}"  # a count that no seed changes
    mean = f"{statistic.mean:,.{digits}g}"
    return mean if statistic.sd is None else f"{mean}{GLUE}±{GLUE}{statistic.sd:.2g}"


def duration(seconds: float | None) -> str:
    """0.2 s, 45 s, 4 min 20 s, 3 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.{int(seconds < 10)}f}{GLUE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    text = f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"
    return text.replace(" ", GLUE)


def memory(size: float | None) -> str:
    """Bytes in MiB or GiB."""
    if size is None:
        return MISSING
    return f"{size / 2**30:.2f}{GLUE}GiB" if size >= 2**30 else f"{size / 2**20:.0f}{GLUE}MiB"


def plural(number: int, thing: str, things: str = "") -> str:
    """ "1 run", "3 runs"."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def metric(name: str) -> str:
    """ "validation/bits_per_byte" as "validation bits per byte"."""
    held_out, _, what = name.partition("/")
    return f"{held_out} {METRICS.get(what, what.replace('_', ' '))}"


def scalars(numbers: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers and text by dotted name; longer lists are left to the JSON."""
    found: dict[str, Any] = {}
    for name, value in numbers.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found |= scalars(value, f"{key}.")
        elif isinstance(value, (int, float, str)):
            found[key] = value
    return found
