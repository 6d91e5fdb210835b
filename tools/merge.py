"""LoRA adapters merged into their matrices: ``python -m tools.merge --workdir=RUN --out=RUN2``.

RUN2 is a run of the plain model (its config has lora off) with one checkpoint, of parameters only: it can be
opened, generated from, evaluated, and started from (``init_from=RUN2``), but not resumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import jax
from etils import epath

from configs.base import ConfigError
from eval.opened import RunError, load_config, open_run
from models.lora import LoRA, LoRAConfig
from runtime import run_record
from runtime.checkpoint import ArchitectureError, CheckpointConfig, CheckpointError, Checkpoints
from runtime.mesh import MeshConfig
from runtime.warm_start import InitConfig
from tasks import bpe


def merge(
    workdir: epath.PathLike, out: epath.PathLike, step: int | None = None, mesh: MeshConfig | None = None
) -> int:
    """Write to ``out`` the run ``workdir`` with W + (alpha / r) A B in place of W, A and B; returns its step.

    Where the run keeps a moving average of its parameters, that is what is merged.

    Args:
        step: of the checkpoint; None for the newest.
        mesh: over all devices, for a model too large for one; None for the first device.

    Raises:
        RunError: ``workdir`` is no run, has no adapters or no checkpoint, or ``out`` holds something.
        ConfigError, ArchitectureError, CheckpointError: as ``eval.opened.open_run``, or ``out`` is full.
    """
    out = epath.Path(out)
    if out.exists() and any(out.iterdir()):
        raise RunError(f"--out={out} is not empty; give a directory that does not exist")
    if not load_config(workdir).lora.rank:
        raise RunError(f"{workdir}: the run has no LoRA adapters (lora.rank=0), so there is nothing to merge")
    run = open_run(workdir, step, mesh=mesh)
    assert isinstance(run.model, LoRA)
    params = jax.jit(run.model.merge)(run.params)
    config = dataclasses.replace(
        run.config,
        lora=LoRAConfig(),
        init_from="",
        init=InitConfig(),
        # The average is merged, and stands for the parameters; patterns were on paths that are no more.
        optim=dataclasses.replace(run.config.optim, ema_decay=None),
        train=dataclasses.replace(run.config.train, freeze=(), unfreeze=()),
    )
    with Checkpoints(out, CheckpointConfig()) as checkpoints:
        checkpoints.save(run.step, {"params": params}, wait=True)
    tokenizer = run.workdir / bpe.FILE
    if tokenizer.exists() and jax.process_index() == 0:
        tokenizer.copy(out / bpe.FILE)
        bpe.inherit(run.workdir, out)
    run_record.save_config(out, config.to_json())
    return run.step


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m tools.merge", allow_abbrev=False)
    options.add_argument("--workdir", required=True, help="directory of the run with adapters")
    options.add_argument("--out", required=True, help="directory of the run to write")
    options.add_argument("--step", type=int, help="checkpoint to read (default: the newest)")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    given = parser().parse_args(argv)
    try:
        step = merge(given.workdir, given.out, given.step)
    except (RunError, ConfigError, ArchitectureError, CheckpointError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"merged step {step} of {given.workdir} into {given.out}")


if __name__ == "__main__":
    main()
