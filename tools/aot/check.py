"""The pod check of one config on one topology, as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

import train
from configs.base import BaseExperiment
from models.functional import parameter_count
from runtime import mesh as meshes
from tools.aot import collectives, explain, memory
from tools.aot.hlo import Program
from tools.aot.programs import OutOfMemory, compile_program, describe, setup_on
from tools.aot.topologies import Topology

Note = Callable[[str], None]


def check(
    config: BaseExperiment,
    topology: Topology,
    programs: Sequence[str],
    note: Note,
    *,
    rows: int | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Compile ``programs`` of ``config`` for ``topology`` and report on each.

    Args:
        rows, context: of generation, see `tools.aot.programs.describe`.

    Returns:
        What ``aot.json`` holds; "fits" tells whether every program does.

    Raises:
        ConfigError: the config, or its mesh on this topology, cannot work.
    """
    note(f"{config.name} on {topology.name}: setting up")
    with setup_on(config, topology.devices) as setup:
        reports = []
        for name in programs:
            note(f"{name}: tracing and compiling for {topology.name}")
            reports.append(_report(setup, topology, name, rows, context))
        return {
            "config": config.name,
            "topology": topology.name,
            "device_kind": topology.kind,
            "devices": len(topology.devices),
            "mesh": dict(setup.mesh.shape),
            "described": meshes.describe(setup.mesh),
            "parameters": parameter_count(setup.model.shapes),
            "batch": [config.task.batch_size, config.task.seq_len],
            "remat": getattr(config.model, "remat", None),
            "accumulation": config.optim.accumulation,
            "hbm": topology.chip.hbm,
            "versions": {"jax": jax.__version__, "libtpu": _libtpu()},
            "programs": reports,
            "fits": all(r["fits"] for r in reports),
        }


def _report(
    setup: train.Setup, topology: Topology, name: str, rows: int | None, context: int | None
) -> dict[str, Any]:
    described = describe(setup, name, rows, context)
    mesh, available = dict(setup.mesh.shape), topology.chip.hbm
    try:
        compiled = compile_program(setup, described)
    except OutOfMemory as error:
        needed = memory.of_refused(described.parts, error)
        found: dict[str, Any] = {"refused": str(error), "buffers": [], "collectives": []}
    else:
        needed = memory.of_compiled(compiled)
        found = _program(setup, described.name, compiled.executable)
        found |= {
            "lower_seconds": compiled.lower_seconds,
            "compile_seconds": compiled.compile_seconds,
            "buffers": [dataclasses.asdict(b) for b in memory.largest(found.pop("program"))],
        }
    advice = memory.advise(needed, setup.config, mesh)
    return {
        "name": name,
        "fits": "refused" not in found and needed.total <= available,
        "verdict": memory.verdict(needed, available, advice),
        "memory": dataclasses.asdict(needed) | {"total": needed.total},
        **found,
    }


def _program(setup: train.Setup, name: str, executable: jax.stages.Compiled) -> dict[str, Any]:
    """Kernels, operations and collectives of a compiled program."""
    text = executable.as_text() or ""
    program = Program(text)
    cost: Any = executable.cost_analysis()
    found = collectives.collectives(program, setup.mesh)
    explained = explain.explain(found, setup.model, setup.mesh)
    report = {
        "program": program,
        "kernels": explain.kernels(program),
        "flops_compiler": cost.get("flops"),
        "collectives": [_plain(c, explained[c.name]) for c in found],
        "unexplained": [c.name for c in found if not explained[c.name]],
    }
    if name == "train":
        module = setup.model.bind(setup.model.shapes)
        report["flops_model"] = setup.objective.flops_per_step(module) / setup.mesh.size
    return report


def _plain(c: collectives.Collective, rows: Sequence[str]) -> dict[str, Any]:
    return {
        "name": c.name,
        "kind": c.kind,
        "axes": list(c.axes),
        "times": c.times,
        "counted": c.counted,
        "shapes": [list(part.dims) for part in c.parts],
        "bytes": c.bytes,
        "op_name": max(c.parts, key=lambda part: part.bytes).op_name,
        "where": c.where,
        "expected": ", ".join(rows),
    }


def _libtpu() -> str:
    from importlib import metadata

    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return "of TPU_LIBRARY_PATH"
