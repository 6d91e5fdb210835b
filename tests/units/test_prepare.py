"""Prepared corpora: the same shards however often killed and by however many workers, every byte once, exact
bits per byte, and what is refused."""

import dataclasses
import hashlib
import json
import math
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from tasks import prepared, sources
from tasks.bpe import BPETokenizer, of_run
from tasks.lm import LMTask, LMTaskConfig
from tasks.tokenizer import ByteTokenizer
from tasks.types import combine_means
from tests.experiments import tiny
from tools.prepare import plan
from tools.prepare.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ("--piece_bytes=256", "--shard_tokens=1500", "--workers=1")


def words(seed, count):
    rng = random.Random(seed)
    names = [f"näme{i}" if i % 5 == 0 else f"name_{i}" for i in range(40)]
    lines = [
        f"{'    ' * rng.randrange(3)}{rng.choice(names)} = {rng.choice(names)}({rng.randrange(99)})\n\n"
        for _ in range(count)
    ]
    return "".join(lines)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """24 small files, an empty one, one of many pieces, and one that is no text."""
    root = tmp_path_factory.mktemp("data") / "texts"
    root.mkdir()
    for i in range(24):
        (root / f"{i:02d}.py").write_text(words(i, 3 + i))
    (root / "empty.py").write_text("")
    (root / "long.py").write_text(words(99, 400))
    (root / "binary.py").write_bytes(bytes(range(256)) * 3)
    return root


def prepare(out, *options):
    main([f"--out={out}", *TINY, *options])
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def bpe(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("bpe") / "corpus"
    return out, prepare(out, f"--source={texts}", "--tokenizer=bpe:400", "--eval_fraction=0.2")


@pytest.fixture(scope="module")
def raw(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("raw") / "corpus"
    return out, prepare(out, f"--source={texts}", "--eval_fraction=0.2")


def digest(directory):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in directory.iterdir()
        if p.name != ".gitignore"
    }


def documents(corpus, separator_id):
    """Ids of every document, without separators."""
    tokens, targets, _ = corpus.pairs()
    ends = np.cumsum(corpus.lengths)
    assert (tokens[ends - corpus.lengths] == separator_id).all()
    return [targets[end - n : end - 1] for end, n in zip(ends, corpus.lengths)]


@pytest.mark.parametrize("separator", [b"", b"\n\n", b"absent"])
@pytest.mark.parametrize("size", [16, 100, 4096])
def test_pieces_are_the_file(tmp_path, separator, size):
    data = words(3, 60).encode() + "ä".encode() * 500 + b"\n\n" + words(4, 5).encode()
    path = tmp_path / "file"
    path.write_bytes(data)
    cut = int(len(data) * 0.7)
    ranges = ((str(path), len(data), 0, cut), (str(path), len(data), cut, len(data)))
    pieces = [
        piece for one in ranges for job in plan.jobs(plan.Stream("train", "s", (one,)), size) for piece in job
    ]
    read = [plan.read_piece(piece, size, separator) for piece in pieces]
    assert b"".join(part for part, _, _ in read) == data
    assert all(len(part) <= 2 * size for part, _, _ in read)
    for part, _, _ in read:
        part.decode()


def test_bytes_are_those_of_the_files(texts, raw):
    out, manifest = raw
    corpus = prepared.load(str(out))
    assert manifest["byte_exact"] and not manifest["skipped"]
    paths = [p for p in sorted(texts.iterdir()) if p.stat().st_size]
    held_out = sources.held_out([p.name for p in paths], 0.2)
    for side, sets in (("train", corpus.train), ("validation", corpus.validation)):
        expected = b"".join(p.read_bytes() for p in paths if (p.name in held_out) == (side == "validation"))
        found = [d.astype(np.uint8).tobytes() for d in documents(sets, 256)]
        assert b"".join(found) == expected
    assert len(manifest["shards"]) > 5
    assert all(1500 <= s["tokens"] < 1500 + 9 * 256 for s in manifest["shards"][:4])


def test_bpe_decodes_to_the_files(texts, bpe):
    out, manifest = bpe
    corpus, tokenizer = prepared.load(str(out)), BPETokenizer(out / "tokenizer.json")
    assert tokenizer.vocab_size == corpus.vocab_size == 400 and manifest["dtype"] == "uint16"
    assert tokenizer.splits_at_lines and manifest["byte_exact"]
    assert {s["file"] for s in manifest["skipped"]} == {str(texts / "binary.py")}
    assert {s["reason"].split()[0] for s in manifest["skipped"]} == {"NUL", "not"}
    assert sum(s["bytes"] for s in manifest["skipped"]) == manifest["sources"][0]["skipped_bytes"] == 768
    text = [tokenizer.decode(d) for d in documents(corpus.train, 0) + documents(corpus.validation, 0)]
    kept = [p.read_text() for p in sorted(texts.iterdir()) if p.name not in ("binary.py", "empty.py")]
    assert sorted("".join(text)) == sorted("".join(kept))
    assert set(kept) - set(text) == {(texts / "long.py").read_text()}


def test_cuts_after_a_line_change_no_token(bpe, tmp_path):
    """Also where a word is longer than a block."""
    text = words(5, 90).replace("    ", "").replace("\n\n", "\n")
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("x" * 3000 + "\n" + text)
    options = (f"--source={tmp_path / '*.txt'}", f"--tokenizer={bpe[0] / 'tokenizer.json'}")
    prepare(tmp_path / "out", *options)
    corpus, tokenizer = prepared.load(str(tmp_path / "out")), BPETokenizer(bpe[0] / "tokenizer.json")
    both = documents(corpus.train, 0) + documents(corpus.validation, 0)
    assert any(np.array_equal(tokenizer.encode(text), d) for d in both)
    assert {tokenizer.decode(d) for d in both} >= {text}


def test_workers_do_not_matter(texts, bpe, tmp_path):
    options = (f"--source={texts}", "--tokenizer=bpe:400", "--eval_fraction=0.2", "--workers=2")
    prepare(tmp_path / "two", *options)
    assert digest(tmp_path / "two") == digest(bpe[0])
    prepare(tmp_path / "two", *options)  # complete already
    main(["--verify", f"--out={tmp_path / 'two'}"])


def test_killed_at_any_moment_it_ends_with_the_same_bytes(texts, raw, tmp_path):
    out, options = tmp_path / "killed", (f"--source={texts}", "--eval_fraction=0.2")
    command = [sys.executable, "-m", "tools.prepare", f"--out={out}", *TINY, *options]
    seen = set()
    for want in (1, 3, 6):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*.bin"))) < want:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.add((out / "manifest.json").exists())
        if (out / "manifest.json").exists():
            break
        with pytest.raises(ValueError, match=r"preparation was not finished.*tools\.prepare again"):
            prepared.load(str(out))
    assert False in seen, "never killed before its end"
    prepare(out, *options)
    assert digest(out) == digest(raw[0])


def test_other_options_are_refused_by_name(texts, bpe):
    common = (f"--source={texts}", "--tokenizer=bpe:400")
    for options, message in (
        ((*common, "--eval_fraction=0.3"), r"started with --eval_fraction = 0\.2, but it is 0\.3 now"),
        (
            (f"--source={texts}", "--tokenizer=bpe:500", "--eval_fraction=0.2"),
            r"started with --tokenizer = 'bpe:400'",
        ),
        ((*common, "--eval_fraction=0.2", "--pattern=0*"), r"started with --pattern = ''"),
    ):
        with pytest.raises(SystemExit, match=message):
            prepare(bpe[0], *options)


def test_what_cannot_be_prepared(texts, tmp_path):
    out = tmp_path / "out"
    for options, message in (
        ((), "--source is missing"),
        (("--source=/no/such",), r"--source='/no/such'.*does not exist"),
        (("--source=a:x:0",), r"weight '0' should be a positive number"),
        ((f"--source={texts}", f"--source=b:{texts}:2"), "give all a weight, or none"),
        ((f"--source=b:{texts}:1", f"--source=b:{texts}:2"), "two are named 'b'"),
        ((f"--source={texts}", "--eval_fraction=1"), r"--eval_fraction=1\.0"),
        ((f"--source={texts}", "--workers=0"), "--workers=0"),
        ((f"--source={texts}", "--tokenizer=bpe:many"), "'many' should be a number"),
        ((f"--source={texts / 'binary.py'}", "--tokenizer=bpe:300"), "no text for the train side.*NUL byte"),
        ((f"--source={texts}", "--tokenizer=bpe:300", "--strict"), r"--strict: .*binary\.py is not text"),
    ):
        with pytest.raises(SystemExit, match=message):
            prepare(out / hashlib.md5(str(options).encode()).hexdigest(), *options)
    with pytest.raises(SystemExit, match="is not empty, and holds no prepared corpus"):
        prepare(texts, f"--source={texts}")


def test_separator_makes_documents(tmp_path):
    body = "one\n\ntwo two\n\n\n\nthree" + "\n\n".join(words(i, 3).replace("\n\n", "\n") for i in range(99))
    (tmp_path / "file.txt").write_text(body)
    manifest = prepare(tmp_path / "out", f"--source={tmp_path / 'file.txt'}", r"--separator=\n\n")
    corpus = prepared.load(str(tmp_path / "out"))
    both = documents(corpus.train, 256) + documents(corpus.validation, 256)
    found = [ByteTokenizer().decode(d) for d in both]
    assert found == [part for part in body.split("\n\n") if part]
    assert sum(s["documents"] for s in manifest["shards"]) == len(found)


def test_weights_are_shares_of_the_training_targets(texts, tmp_path):
    (tmp_path / "b").mkdir()
    for i in range(30):
        (tmp_path / "b" / f"{i}.txt").write_text(f"<{i}>" * 40)
    prepare(tmp_path / "out", f"--source=a:{texts}:1", f"--source=b:{tmp_path / 'b'}:3")
    corpus = prepared.load(str(tmp_path / "out"))
    found = documents(corpus.train, 256)
    mine = [d.tobytes() for d in found if d[0] == ord("<")]
    share = sum(len(d) + 1 for d in found if d[0] == ord("<")) / corpus.train.targets
    assert share == pytest.approx(0.75, abs=0.01)
    counts = {mine.count(d) for d in set(mine)}
    assert max(counts) - min(counts) <= 1 < min(counts)  # repeats of the smaller source, all but evenly
    assert sum(d[0] != ord("<") for d in found) == len({d.tobytes() for d in found if d[0] != ord("<")})
    np.testing.assert_allclose(prepared.epochs([10, 40], [1.0, 1.0]), [4, 1])


def config(out, **fields):
    return LMTaskConfig(source=str(out), seq_len=32, batch_size=4, **fields)


def test_training_sees_every_target_once_an_epoch(raw):
    task = LMTask(config(raw[0]))
    assert isinstance(task.tokenizer, ByteTokenizer) and task.vocab_size == 257
    seen = np.zeros(257, np.int64)
    windows, data = -(-task.training.targets // 32), task.train()
    for step in range(windows):  # four epochs: rows of an epoch may end within a batch
        batch = data[step]
        seen += np.bincount(batch["targets"][batch["weights"] > 0], minlength=257)
    np.testing.assert_array_equal(seen, 4 * np.bincount(task.training.pairs()[1], minlength=257))


def test_bits_per_byte_counts_the_bytes_of_the_targets(bpe):
    task = LMTask(config(bpe[0]))
    data = task.eval_sets()["validation"]
    nll = jnp.ones((4, 32), jnp.float32)
    means = combine_means(task.metrics({"nll": nll}, data[i]) for i in range(len(data)))
    size = sum(s["bytes"] for s in bpe[1]["shards"] if s["side"] == "validation")
    assert means["bits_per_byte"] == pytest.approx(task.validation.targets / size / math.log(2), rel=1e-6)
    assert task.bytes_per_token == pytest.approx(bpe[1]["bytes_per_token"])


def test_a_prepared_source_is_checked(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"task\.vocab_size=300 is set.*leave the field unset"):
        LMTask(config(bpe[0], vocab_size=300))
    with pytest.raises(ValueError, match=r"fewer than one batch of task\.batch_size=4000"):
        LMTask(dataclasses.replace(config(bpe[0]), batch_size=4000))
    copy = tmp_path / "copy"
    shutil.copytree(bpe[0], copy)
    shard = next(copy.glob("train*.bin"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit, match=rf"{shard.name}: its sha256 is"):
        main(["--verify", f"--out={copy}"])
    shard.write_bytes(data[:-2])
    with pytest.raises(ValueError, match=rf"{shard.name} has \d+ bytes, but manifest\.json says"):
        LMTask(config(copy))


def test_a_run_keeps_its_tokenizer(bpe, tmp_path):
    experiment = tiny(bpe[0], steps=3)
    experiment.model.pattern, experiment.model.vocab_size = "-", 400  # compiles soonest
    experiment.task.eval_batches = 1
    results = train.run(experiment, tmp_path, jax.devices()[:1])
    assert 0 < results["validation/bits_per_byte"] < 9
    kept = tmp_path / "tokenizer.json"
    assert kept.read_text() == (bpe[0] / "tokenizer.json").read_text()
    assert of_run(tmp_path, experiment.task).vocab_size == 400
    kept.write_text("{}")
    with pytest.raises(train.ConfigError, match="trained with another tokenizer"):
        train.run(experiment, tmp_path, jax.devices()[:1])
    experiment.model.vocab_size = 300
    with pytest.raises(train.ConfigError, match=r"model\.vocab_size=300, but task\.source has ids up to 399"):
        train.setup(experiment, jax.devices()[:1])


def test_special_tokens_in_a_text_are_text(bpe):
    tokenizer = BPETokenizer(bpe[0] / "tokenizer.json")
    ids = tokenizer.encode("a<|endoftext|>b", separator=True)
    assert list(ids).count(tokenizer.separator_id) == 1
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
