"""Published checkpoints to runs and back.

``python -m tools.convert import --from=DIR --to=RUN`` reads safetensors or torch's .bin of Hugging Face or of
the state-spaces authors; RUN is then like any other: generate from it, probe it, start a run from it.
``python -m tools.convert export --from=RUN --to=DIR`` writes what transformers loads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from configs.base import ConfigError
from eval.opened import RunError
from models import published
from runtime.checkpoint import ArchitectureError, CheckpointError
from runtime.tensor_files import SHARD_BYTES
from tools.convert.exporting import PLAIN, STATE_SPACE, export_run
from tools.convert.importing import DTYPES, import_checkpoint, mesh_of
from tools.convert.published_files import ConvertError, TensorFileError


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m tools.convert", allow_abbrev=False)
    commands = options.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="a published checkpoint becomes a run").add_argument
    add("--from", dest="source", required=True, help="its directory, or a file of tensors in it")
    add("--to", required=True, help="directory of the run to write")
    add("--dtype", choices=DTYPES, help="of the parameters (default: as in the file)")
    add(
        "--mesh",
        default="fsdp=-1",
        help="how parameters are split while they are read, as in fsdp=4,tensor=2",
    )
    add("--tokenizer", help="directory or tokenizer.json in place of the checkpoint's own; none for none")
    add("--seq_len", type=int, help="tokens of a row for training and probes (default: what its config says)")
    add(
        "--vocab_multiple",
        type=int,
        help="pad the vocabulary to a multiple, so that a head divides over devices",
    )
    add = commands.add_parser("export", help="a run becomes a published checkpoint").add_argument
    add("--from", dest="source", required=True, help="the run: RUN or RUN@STEP")
    add("--to", required=True, help="directory of the checkpoint to write")
    formats = ", ".join([*published.FORMATS, PLAIN, STATE_SPACE])
    add("--format", help=f"one of {formats} (default: that it was imported from, or the first that fits)")
    add("--dtype", choices=DTYPES, help="of the tensors (default: as in the checkpoint of the run)")
    add("--shard_bytes", type=int, default=SHARD_BYTES, help="of a file of tensors, at most")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    given, start = parser().parse_args(argv), time.perf_counter()
    try:
        if given.command == "import":
            made = import_checkpoint(
                given.source,
                given.to,
                dtype=given.dtype,
                mesh=mesh_of(given.mesh),
                tokenizer=given.tokenizer,
                seq_len=given.seq_len,
                vocab_multiple=given.vocab_multiple,
            )
            told = f"{given.to}: pattern {made.model.pattern}, width {made.model.d_model}, {made.model.dtype}"
        else:
            told = export_run(
                given.source,
                given.to,
                format=given.format,
                dtype=given.dtype,
                shard_bytes=given.shard_bytes,
            )
    except (
        ConvertError,
        TensorFileError,
        RunError,
        ConfigError,
        ArchitectureError,
        CheckpointError,
        OSError,
    ) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{told}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
