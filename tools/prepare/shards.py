"""Shards of token ids, whenever the writing is killed.

A shard is written under a temporary name and renamed when whole; only then is it entered into progress.json,
with the number of jobs that all shards so far hold. A preparation that starts again goes on with the next
job, and writes the bytes that it would have written.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tasks.prepared import Shard
from tools.prepare.encode import Encoded, Encoder, Skipped, encode_all
from tools.prepare.files import replace_bytes
from tools.prepare.plan import PrepareError, Stream, jobs
from tools.prepare.record import Progress


def write_shards(
    directory: Path,
    streams: Sequence[Stream],
    encoder: Encoder,
    progress: Progress,
    *,
    separator_id: int,
    shard_tokens: int,
    workers: int,
    strict: bool,
) -> Iterator[int]:
    """Write what ``progress`` lacks, and enter it there; gives the bytes read as they are settled, those of
    earlier starts first.

    A shard is closed at the end of the first job, and of a document, at which it has ``shard_tokens``.

    Raises:
        PrepareError: ``strict``, and something is not text.
    """
    work = ((stream, job) for stream in streams for job in jobs(stream, encoder.piece_bytes))
    yield sum(piece.stop - piece.start for _, job in itertools.islice(work, progress.jobs) for piece in job)
    here, ahead = itertools.tee(work)
    shard: _ShardWriter | None = None
    stream_of: Stream | None = None
    done, skipped = progress.jobs, list[Skipped]()

    def settle() -> None:
        nonlocal shard
        if shard is not None:
            progress.shards.append(shard.close())
            progress.jobs, progress.skipped = done, progress.skipped + skipped
            skipped.clear()
            progress.save(directory)
        shard = None

    for (stream, _), encoded in zip(here, encode_all(encoder, (job for _, job in ahead), workers)):
        if stream is not stream_of:
            settle()
            stream_of = stream
        if encoded.skipped and strict:
            raise PrepareError(
                f"--strict: {encoded.skipped[0].file} is not text: {encoded.skipped[0].reason}"
            )
        if len(encoded.lengths):
            if shard is None:
                number = sum((s.side, s.source) == (stream.side, stream.source) for s in progress.shards)
                name = f"{stream.side}-{stream.source}-{number:05d}"
                shard = _ShardWriter(directory, name, stream, encoder.dtype, separator_id)
            shard.append(encoded)
            progress.byte_exact &= encoded.exact
        elif shard is not None:
            shard.open = False
        skipped += encoded.skipped
        done += 1
        if shard is not None and shard.tokens >= shard_tokens and not shard.open:
            settle()
        yield encoded.read
    settle()
    progress.skipped += skipped


class _ShardWriter:
    """One shard in the making. ``open`` tells whether its last document may go on."""

    def __init__(self, directory: Path, name: str, stream: Stream, dtype: str, separator_id: int):
        self.name, self.stream = name, stream
        self.tokens = self.bytes = 0
        self.open = False
        self._starts: list[np.ndarray] = []
        self._documents = 0
        self._separator, self._dtype = separator_id, dtype
        self._directory, self._hash = directory, hashlib.sha256()
        self._file = (directory / f".{self.name}.bin.tmp").open("wb")

    def append(self, encoded: Encoded) -> None:
        """Add the documents of a job."""
        lengths = encoded.lengths
        goes_on = encoded.continues and self.open
        # Where a separator goes: before every document but one that goes on.
        before = (np.cumsum(lengths) - lengths)[1 if goes_on else 0 :]
        self._starts.append(self.tokens + before + np.arange(len(before)))
        self._documents += len(before)
        self._write(np.insert(encoded.ids, before, self._separator))
        self.bytes += encoded.bytes
        self.open = encoded.open

    def close(self) -> Shard:
        """Write the last separator, and make the shard's files appear under their names."""
        self._write(np.array([self._separator]))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        starts = io.BytesIO()
        np.save(starts, np.concatenate(self._starts).astype(np.int64))
        replace_bytes(self._directory / f"{self.name}.starts.npy", starts.getvalue())
        os.replace(self._file.name, self._directory / f"{self.name}.bin")
        return Shard(
            name=self.name,
            side=self.stream.side,
            source=self.stream.source,
            tokens=self.tokens,
            documents=self._documents,
            bytes=self.bytes,
            sha256=self._hash.hexdigest(),
            starts_sha256=hashlib.sha256(starts.getvalue()).hexdigest(),
        )

    def _write(self, ids: np.ndarray) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)
