"""Will it fit? ``python -m tools.aot --config=configs/NAME.py --topology=v5e:16x16 [--config.FIELD=VALUE]``.

Compiles a run's own train step, with its Pallas kernels, and the prefill and decode steps of generation, for
a named TPU topology, on any Linux machine without one (needs ``pip install -e '.[aot]'``). Prints memory by
device, collectives by mesh axis, operations and the largest values, and writes OUT/aot.json. Ends with 1 if
something does not fit. ``--suggest`` ranks meshes, remat and accumulation, and compiles the best three.
No data is read: zeros stand in for text that is not installed.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import jax
from absl import app, flags
from etils import epath
from rich.console import Console

import train
from configs.base import ConfigError
from tools.aot import suggest
from tools.aot.check import check
from tools.aot.programs import NAMES, setup_on
from tools.aot.show import show, show_candidates
from tools.aot.topologies import TopologyError, describe

TOPOLOGY = flags.DEFINE_string("topology", "", "CHIP:SHAPE, as in v5e:16x16 or v5p:4x4x8.")
PROGRAMS = flags.DEFINE_list("programs", list(NAMES), f"Some of {','.join(NAMES)}.")
ROWS = flags.DEFINE_integer(
    "rows", None, "Prompts of generation; one a device of mesh.data x mesh.fsdp if unset."
)
CONTEXT = flags.DEFINE_integer("context", None, "Tokens that generation has room for; task.seq_len if unset.")
SUGGEST = flags.DEFINE_bool("suggest", False, "Rank meshes, remat and accumulation; compile the best three.")
OUT = flags.DEFINE_string("out", None, "Directory for aot.json; none is written if unset.")
BEST = 3


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are --config.FIELD=VALUE")
    jax.config.update("jax_platforms", "cpu")  # nothing runs here, not even where there is an accelerator
    if unknown := sorted(set(PROGRAMS.value) - set(NAMES)):
        sys.exit(f"--programs={unknown[0]}: there is no such program; use some of {','.join(NAMES)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        found = _suggested(console) if SUGGEST.value else [_checked(console)]
    except (ConfigError, TopologyError, RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for report in found:
        show(report, console)
    if OUT.value:
        path = epath.Path(OUT.value) / "aot.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found if SUGGEST.value else found[0], indent=1) + "\n")
        console.print(f"written to {path}")
    if not any(report["fits"] for report in found):
        sys.exit(1)


def _checked(console: Console) -> dict[str, Any]:
    topology = describe(TOPOLOGY.value)
    with console.status("starting") as status:
        return check(
            train.CONFIG.value,
            topology,
            PROGRAMS.value,
            status.update,
            rows=ROWS.value,
            context=CONTEXT.value,
        )


def _suggested(console: Console) -> list[dict[str, Any]]:
    """Reports on the train step of the best candidates."""
    topology, config = describe(TOPOLOGY.value), train.CONFIG.value
    reports = []
    with console.status("ranking") as status:
        plain = copy.deepcopy(config)
        # Any mesh will do for the sizes of the model; the batch is checked for each candidate.
        plain.mesh.data, plain.mesh.fsdp, plain.mesh.tensor, plain.mesh.sequence = 1, 1, 1, 1
        with setup_on(plain, topology.devices[:1]) as setup:
            candidates = suggest.suggest(setup, topology)
        show_candidates(candidates, topology.chip.hbm, console)
        for candidate in candidates:
            chosen = copy.deepcopy(config)
            suggest.apply(chosen, candidate)
            console.print(f"compiling {candidate.command}")
            try:
                reports.append(check(chosen, topology, ["train"], status.update))
            except ConfigError as error:  # what the ranking does not know of, such as groups of CCA
                console.print(f"left out: {error}", markup=False)
            if len(reports) == BEST:
                break
    return reports


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=train.parse_flags)
