"""A corpus of token ids from text: ``python -m tools.prepare --source=PATH --out=DIR``.

Sources are ``stdlib``, a file, directory or glob, local or ``gs://``; several of them may be mixed by weight,
``--source=code:src/:3 --source=prose:books/:1`` (see `tasks.prepared` for what the weights do). Train on the
result with ``--config.task.source=DIR``. Killed at any moment and started again with the same options, it
goes on and ends with the same bytes, whatever the number of workers. Memory does not grow with the text.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from rich import progress as bars
from rich.console import Console

from tasks import bpe
from tasks.prepared import MANIFEST, TOKENIZER
from tools.prepare import plan, record
from tools.prepare.encode import Encoder, vocabulary
from tools.prepare.files import replace_bytes, sha256
from tools.prepare.plan import Listing, PrepareError
from tools.prepare.shards import write_shards


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m tools.prepare", allow_abbrev=False)
    add = options.add_argument
    add(
        "--source",
        action="append",
        default=[],
        help="stdlib, a path or glob, or NAME:PATH:WEIGHT; repeatable",
    )
    add("--out", required=True, help="local directory of the corpus")
    add("--pattern", default="", help="names of the files that are read, as in '*.txt'")
    add(
        "--tokenizer",
        default="bytes",
        help="bytes, bpe:VOCAB (learned here), or the path of a tokenizer.json",
    )
    add(
        "--separator",
        default="",
        help=r"text that parts documents within a file, as in '\n\n'; none: a file is one",
    )
    add("--eval_fraction", type=float, default=0.05, help="share of the files (of a single file) held out")
    add("--shard_tokens", type=int, default=1 << 26, help="a shard is closed once it has this many")
    add("--piece_bytes", type=int, default=plan.LONGEST_PIECE, help="read and encoded at once")
    add(
        "--tokenizer_bytes", type=int, default=1 << 26, help="of training text that bpe:VOCAB is learned from"
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that encode")
    add("--strict", action="store_true", help="refuse files that are not text instead of skipping them")
    add("--verify", action="store_true", help="only check the sha256 of all that is in --out")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    given = options.parse_args(argv)
    console = Console(soft_wrap=True, highlight=False)
    try:
        if given.verify:
            console.print(f"{given.out}: {record.verify(Path(given.out))} shards are as they were written")
        else:
            prepare(given, console)
    except (PrepareError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def prepare(given: argparse.Namespace, console: Console) -> None:
    """Do what the options say, from wherever an earlier start was stopped.

    Raises:
        PrepareError: an option or a file is in the way; the message names it.
    """
    _check(given)
    listings = [
        plan.list_files(source, given.pattern, given.eval_fraction)
        for source in plan.parse_sources(given.source)
    ]
    out = Path(given.out)
    try:
        done = record.open_progress(out, _settings(given, listings))
    except FileExistsError:
        console.print(f"{out} is complete already")
        return
    tokenizer = _tokenizer(given, listings, out, console)
    words = vocabulary(tokenizer)
    separator = given.separator.encode().decode("unicode_escape").encode()
    encoder = Encoder(str(tokenizer or ""), words[2], separator, given.piece_bytes)
    streams = [stream for listing in listings for stream in listing.streams]
    with _bar(console) as bar:
        task = bar.add_task("tokens", total=sum(s.bytes for s in streams))
        for size in write_shards(
            out,
            streams,
            encoder,
            done,
            separator_id=words[1],
            shard_tokens=given.shard_tokens,
            workers=given.workers,
            strict=given.strict,
        ):
            bar.advance(task, size)
    sources = [
        {
            "name": listing.source.name,
            "path": listing.source.path,
            "weight": listing.source.weight,
            "files": listing.files,
            "bytes": listing.bytes,
            "split": listing.split,
        }
        for listing in listings
    ]
    _tell(record.finish(out, done, sources, words), out, console)


def _check(given: argparse.Namespace) -> None:
    """Raises PrepareError: an option that cannot be."""
    if "://" in given.out:
        raise PrepareError(f"--out={given.out}: should be a local directory; copy it when it is complete")
    if not 0 < given.eval_fraction < 1:
        raise PrepareError(f"--eval_fraction={given.eval_fraction} should lie between 0 and 1")
    for name in ("shard_tokens", "tokenizer_bytes", "workers"):
        if getattr(given, name) < 1:
            raise PrepareError(f"--{name}={getattr(given, name)} should be at least 1")
    if not 16 <= given.piece_bytes <= plan.LONGEST_PIECE:
        raise PrepareError(f"--piece_bytes={given.piece_bytes} should lie in 16..{plan.LONGEST_PIECE}")


def _settings(given: argparse.Namespace, listings: Sequence[Listing]) -> record.Settings:
    """All that the shards depend on."""
    settings: dict[str, Any] = {
        f"--{name}": getattr(given, name)
        for name in (
            "pattern",
            "tokenizer",
            "separator",
            "eval_fraction",
            "shard_tokens",
            "piece_bytes",
            "strict",
        )
    }
    if given.tokenizer.startswith("bpe:"):
        settings["--tokenizer_bytes"] = given.tokenizer_bytes
    elif given.tokenizer != "bytes":
        settings["sha256 of --tokenizer"] = sha256(Path(given.tokenizer))
    for listing in listings:
        source = listing.source
        settings[f"--source {source.name}"] = {
            "path": source.path,
            "weight": source.weight,
            "names and sizes of files": listing.digest,
        }
    return settings


def _tokenizer(
    given: argparse.Namespace, listings: Sequence[Listing], out: Path, console: Console
) -> epath.Path | None:
    """The tokenizer.json of ``out``, learned or copied if it is not there yet; None for bytes."""
    path = out / TOKENIZER
    if given.tokenizer == "bytes":
        return None
    if not path.exists():
        if given.tokenizer.startswith("bpe:"):
            size = given.tokenizer.removeprefix("bpe:")
            if not size.isdecimal():
                raise PrepareError(
                    f"--tokenizer={given.tokenizer}: {size!r} should be a number, as in bpe:32768"
                )
            console.print(
                f"learning {size} tokens from up to {given.tokenizer_bytes / 1e6:.0f} MB of training text"
            )
            text = bpe.train(_sample(given, listings), int(size))
        else:
            text = Path(given.tokenizer).read_text()
        replace_bytes(path, text.encode())
    return epath.Path(path)


def _sample(given: argparse.Namespace, listings: Sequence[Listing]) -> Iterator[str]:
    """Training text, in pieces: all, or evenly spread pieces of about ``--tokenizer_bytes`` in all."""
    train = [listing.streams[0] for listing in listings]
    total = sum(stream.bytes for stream in train)
    keep, seen = min(given.tokenizer_bytes / total, 1.0), 0.0
    for piece in itertools.chain.from_iterable(j for s in train for j in plan.jobs(s, given.piece_bytes)):
        seen += keep
        if seen >= 1:
            seen -= 1
            data = plan.read_piece(piece, given.piece_bytes, b"")[0]
            if b"\0" not in data:
                yield data.decode(errors="ignore")


def _bar(console: Console) -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        console=console,
    )


def _tell(manifest: dict[str, Any], out: Path, console: Console) -> None:
    """What has become of the text."""
    for side in plan.SIDES:
        shards = [shard for shard in manifest["shards"] if shard["side"] == side]
        tokens, documents = (sum(shard[field] for shard in shards) for field in ("tokens", "documents"))
        console.print(f"{side}: {tokens:,} tokens, {documents:,} documents, {len(shards)} shards")
    console.print(f"{manifest['bytes_per_token']:.3f} bytes per token; train with --config.task.source={out}")
    if manifest["skipped"]:
        names = len({entry["file"] for entry in manifest["skipped"]})
        size = sum(entry["bytes"] for entry in manifest["skipped"])
        console.print(f"skipped as no text: {size:,} bytes of {names} files, listed in {out / MANIFEST}")


if __name__ == "__main__":
    main()
