"""The probes by name. A new one is a file like those beside this one, and an entry here."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any

from eval.probes.babi import Babi
from eval.probes.bits_per_byte import BitsPerByte
from eval.probes.condensing import Condensing
from eval.probes.influence import Influence
from eval.probes.length_extrapolation import LengthExtrapolation
from eval.probes.loss_by_position import LossByPosition
from eval.probes.mutual_information import MutualInformation
from eval.probes.needles import Needles
from eval.probes.passkey import Passkey
from eval.probes.recall import Recall
from eval.probes.receptive_field import ReceptiveField
from eval.probes.smoothing import Smoothing
from eval.probes.speed import Speed
from eval.probes.state_collapse import StateCollapse
from eval.probes.types import Probe

PROBES: dict[str, type[Probe]] = {
    probe.name: probe
    for probe in (
        BitsPerByte,
        LossByPosition,
        LengthExtrapolation,
        Condensing,
        Passkey,
        Needles,
        Babi,
        Recall,
        StateCollapse,
        Influence,
        Smoothing,
        ReceptiveField,
        MutualInformation,
        Speed,
    )
}


def choose(names: str, settings: Sequence[str] = ()) -> list[Probe]:
    """The probes of ``names`` ("a,b" or "all"), with ``settings`` such as "a.rows=32"; values are JSON.

    Raises:
        ValueError: a probe or a setting that does not exist (names the nearest), or a value that cannot work.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    wanted = list(PROBES) if wanted == ["all"] else list(dict.fromkeys(wanted))
    if not wanted:
        raise ValueError(f"--probes={names!r} names no probe; there are {', '.join(PROBES)}, or all")
    given: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for name in wanted:
        _known("probe", name, PROBES)
    for setting in settings:
        path, equals, value = setting.partition("=")
        name, _, field = path.partition(".")
        if not (equals and field):
            raise ValueError(f"--set={setting}: expected PROBE.SETTING=VALUE")
        _known("probe", name, given)
        given[name][field] = _value(PROBES[name], field, value)
    return [PROBES[name](**fields) for name, fields in given.items()]


def _value(probe: type[Probe], field: str, text: str) -> Any:
    """``text`` as a value for a field of ``probe``, of the type of its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(probe)}  # type: ignore[arg-type]
    _known(f"setting of {probe.name}", field, defaults)
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    kind = type(defaults[field])
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind and defaults[field] is not None:
        raise ValueError(f"{probe.name}.{field}={text} should be of type {kind.__name__}")
    return value


def _known(what: str, name: str, known: Sequence[str] | dict[str, Any]) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, list(known), 1, 0.0)
        there = f"did you mean {nearest[0]!r}? There are {', '.join(known)}" if nearest else "there is none"
        raise ValueError(f"there is no {what} {name!r}; {there}")
