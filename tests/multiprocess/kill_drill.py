"""Kills one process of a run at random steps, again and again, and compares what comes out with a whole run.

``python -m tests.multiprocess.kill_drill [--processes=4] [--kills=3] [--steps=24] [--every=4] [--seed=0]``:
each time a random process gets SIGKILL before a random step, the others must end, and the same command goes
on. At the end the losses are compared with those of one process that nobody disturbed.
"""

import argparse
import pathlib
import random
import re
import sys
import tempfile
import time

import numpy as np

from tests.experiments import write_corpus
from tests.several import losses, train_processes

FLAGS = ("--config.model.pattern=*-", "--config.train.baselines=False", "--config.train.sample_length=0")


def drill(root: pathlib.Path, processes: int, kills: int, steps: int, every: int, seed: int) -> None:
    """Prints a line a start. Raises AssertionError where something was lost."""
    rng = random.Random(seed)
    config = f"tests/tiny_config.py:{write_corpus(root / 'corpus')}"
    flags = (*FLAGS, f"--config.train.steps={steps}", f"--config.checkpoint.every={every}")
    several = (*flags, "--config.mesh.data=1", "--config.mesh.fsdp=-1")
    run, whole = root / "run", root / "whole"
    at = sorted(rng.sample(range(1, steps), kills))
    for start, step in enumerate([*at, None]):
        victim, begun = rng.randrange(processes), time.monotonic()
        signal_at = "" if step is None else f"{victim}:{step}:SIGKILL"
        told = train_processes(processes, config, run, *several, signal_at=signal_at)
        resumed = re.search(r"resuming \S+ from step (\d+)", told[0][1])
        said = sorted({line for _, out in told for line in out.splitlines() if "LostProcess" in line})
        print(
            f"start {start}: from step {resumed.group(1) if resumed else 0}, "
            + (f"process {victim} killed before step {step}" if step is not None else "to the end")
            + f"; statuses {[status for status, _ in told]}; {time.monotonic() - begun:.0f} s",
            *said,
            sep="\n  ",
            flush=True,
        )
        assert all((status != 0) == (step is not None) for status, _ in told), told
    train_processes(1, config, whole, *flags, "--config.mesh.data=1")
    broken, one = losses(run), losses(whole)
    assert sorted(broken) == sorted(one) == list(range(1, steps + 1)), sorted(broken)
    gap = np.abs(np.array(list(broken.values())) / np.array(list(one.values())) - 1).max()
    print(f"{steps} losses, largest relative difference from one undisturbed process: {gap:.1e}")
    assert gap < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("processes", 4), ("kills", 3), ("steps", 24), ("every", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    with tempfile.TemporaryDirectory() as root:
        drill(pathlib.Path(root), **vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
