"""Layer patterns: strings of sub-layer symbols, and their decomposition into repeated runs.

The published notation: "M" Mamba-2, "*" attention, "-" MLP, each a pre-norm residual sub-layer of its own.
"""

from __future__ import annotations

import functools


def parse(pattern: str, known: str) -> str:
    """The pattern with repeats written out: "(M-)24" means "M-" twenty-four times; "M*2" is not a repeat.

    Raises:
        ValueError: an unknown symbol, an unbalanced bracket, or an empty pattern; it names the position.
    """
    out, i = "", 0
    while i < len(pattern):
        if pattern[i] == "(":
            close = pattern.find(")", i)
            digits = ""
            while close > 0 and close + 1 + len(digits) < len(pattern):
                if not pattern[close + 1 + len(digits)].isdigit():
                    break
                digits += pattern[close + 1 + len(digits)]
            if close < 0 or not digits:
                raise ValueError(f"model.pattern={pattern!r}: position {i}: expected '(...)N'")
            out += pattern[i + 1 : close] * int(digits)
            i = close + 1 + len(digits)
        else:
            out += pattern[i]
            i += 1
    unknown = sorted(set(out) - set(known))
    if unknown or not out:
        found = f"unknown symbol {unknown[0]!r}" if unknown else "no layers"
        raise ValueError(f"model.pattern={pattern!r}: {found}; known symbols are {' '.join(known)}")
    return out


def runs(pattern: str) -> list[tuple[str, int]]:
    """Split into ``(unit, repeats)`` so that the units together are as short as can be.

    A stacked run compiles its unit once whatever its repeats, so this makes compile time flat in depth:
    "M-M-M-*-" becomes [("M-", 3), ("*-", 1)].
    """

    @functools.cache
    def best(start: int) -> tuple[float, tuple[tuple[str, int], ...]]:
        if start == len(pattern):
            return 0.0, ()
        options = []
        for size in range(1, len(pattern) - start + 1):
            unit, count = pattern[start : start + size], 1
            while True:
                tail_cost, tail = best(start + size * count)
                # A run costs its unit, and a little for being one more scan.
                options.append((size + 0.5 + tail_cost, ((unit, count), *tail)))
                if pattern[start + size * count : start + size * (count + 1)] != unit:
                    break
                count += 1
        return min(options, key=lambda option: option[0])

    return list(best(0)[1])
