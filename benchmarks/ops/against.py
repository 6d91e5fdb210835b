"""The kernels of an earlier commit beside today's, in one run."""

from __future__ import annotations

import contextlib
import importlib
import io
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = "pallas_kernels"


@contextlib.contextmanager
def checkout(commit: str, root: pathlib.Path = ROOT) -> Iterator[pathlib.Path]:
    """A temporary folder with ``pallas_kernels`` as it was at ``commit``.

    Raises:
        ValueError: git does not know the commit, or has no such folder in it.
    """
    command = ["git", "-C", str(root), "archive", commit, FOLDER]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise ValueError(f"--against={commit}: {done.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield pathlib.Path(folder)


def resolve(commit: str, root: pathlib.Path = ROOT) -> str:
    """The full id of ``commit``, which may be any name git knows, as "HEAD~3".

    Raises:
        ValueError: git does not know it.
    """
    command = ["git", "-C", str(root), "rev-parse", "--verify", f"{commit}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--against={commit}: {done.stderr.strip()}")
    return done.stdout.strip()


def use(folder: pathlib.Path) -> None:
    """From now on this process imports ``pallas_kernels`` from ``folder``."""
    importlib.import_module("benchmarks.ops.worker")  # while what it needs of today's is there
    for name in [name for name in sys.modules if name.partition(".")[0] == FOLDER]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
