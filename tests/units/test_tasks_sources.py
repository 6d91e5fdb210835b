"""Sources: the standard library's split, directories, files and token arrays, and what is refused."""

import json

import numpy as np
import pytest

from tasks import sources, stdlib
from tasks.corpus import Corpus
from tasks.manifest import read_cache, write_cache
from tasks.sources import SourceConfig


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return sources.load(SourceConfig(cache_dir=str(cache))), cache


def load(tmp_path, **fields):
    return sources.load(SourceConfig(cache_dir=str(tmp_path / "cache"), **fields))


def text(corpus):
    targets = corpus.pairs()[1]
    return bytes(targets[targets < 256].astype(np.uint8))


def test_library_split_is_by_package_and_fair(library):
    splits, _ = library
    sides = {"train": {}, "validation": {}}
    for file in splits.manifest.files:
        side = sides[file.split]
        side[stdlib.package(file.path)] = side.get(stdlib.package(file.path), 0) + file.bytes
    held_out, total = sides["validation"], splits.manifest.bytes("validation")
    assert not held_out.keys() & sides["train"].keys()
    assert not held_out.keys() & stdlib.TABLES
    assert {"encodings", "pydoc_data", "locale", "html"} <= sides["train"].keys()
    assert 15 <= len(held_out) <= 30
    assert 400_000 < total < 700_000 < 8_000_000 < splits.manifest.bytes("train")
    assert max(held_out.values()) < 0.12 * total
    assert len(text(splits.validation)) == total
    assert not any("test" in f.path.split("/")[:-1] for f in splits.manifest.files)


def test_library_is_the_same_each_time_and_its_manifest_is_kept(library, tmp_path):
    splits, cache = library
    again = load(tmp_path)
    assert again.manifest.digest == splits.manifest.digest
    written = list(cache.iterdir())
    assert [p.name for p in written] == [f"manifest-{splits.manifest.digest[:16]}.json"]
    content = json.loads(written[0].read_text())
    assert content["rule"]["validation_packages"] == sorted(stdlib.VALIDATION_PACKAGES)
    assert len(content["files"]) == len(splits.manifest.files)
    assert splits.manifest.files[0].sha256 in written[0].read_text()


def test_a_stripped_library_still_has_a_split():
    sizes = {"encodings": 500_000, "json": 30_000, "_private": 20_000} | {f"m{i}": 10_000 for i in range(40)}
    chosen = stdlib.choose_validation(sizes)
    share = sum(sizes[c] for c in chosen) / sum(sizes.values())
    assert "json" in chosen and "encodings" not in chosen and "_private" not in chosen
    assert stdlib.LEAST <= share <= stdlib.MOST
    assert chosen == stdlib.choose_validation(dict(reversed(sizes.items())))


def test_max_train_tokens_shortens_training_only(library, tmp_path):
    short = load(tmp_path, max_train_tokens=5000)
    assert short.train.targets == 5000
    assert short.validation.targets == library[0].validation.targets


def directory(tmp_path, count=40):
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").write_bytes(b"secret")
    for i in range(count):
        (root / ("deep" if i % 2 else ".") / f"{i:02d}.txt").write_bytes(b"<%03d>" % i * 10)
    (root / "notes.md").write_bytes(b"#" * 50)
    return root


def test_directory_is_split_by_file(tmp_path):
    root = directory(tmp_path)
    splits = load(tmp_path, source=str(root), eval_fraction=0.3)
    whole = sorted(f.path for f in splits.manifest.files)
    assert len(whole) == 41 and ".hidden" not in whole
    train, validation = text(splits.train), text(splits.validation)
    assert len(train) + len(validation) == 40 * 50 + 50
    for i in range(40):
        assert (b"<%03d>" % i in train) != (b"<%03d>" % i in validation)
    assert 4 <= len(splits.validation.lengths) <= 20
    only = load(tmp_path, source=str(root), pattern="*.txt")
    assert {f.path.split(".")[-1] for f in only.manifest.files} == {"txt"}


def test_glob_is_the_directory_with_a_pattern(tmp_path):
    root = directory(tmp_path)
    splits = load(tmp_path, source=str(root / "deep" / "*.txt"), eval_fraction=0.01)
    assert len(splits.manifest.files) == 20
    assert len(splits.validation.lengths) == 1  # at least one file, whatever the hashes


@pytest.mark.parametrize(
    "source, count", [("texts", 41), ("texts/*.txt", 20), ("texts/**/*.txt", 40), ("t*/deep", 0), (".", 41)]
)
def test_relative_paths_and_globs(tmp_path, monkeypatch, source, count):
    directory(tmp_path)
    monkeypatch.chdir(tmp_path)
    if count == 0:
        with pytest.raises(FileNotFoundError, match=r"task\.source='t\*/deep'"):
            load(tmp_path, source=source)
    else:
        assert len(load(tmp_path, source=source).manifest.files) == count


def test_single_file_is_cut(tmp_path):
    path = tmp_path / "book"
    path.write_bytes(bytes(range(200)))
    splits = load(tmp_path, source=str(path), eval_fraction=0.25)
    assert text(splits.train) + text(splits.validation) == bytes(range(200))
    assert splits.validation.targets == 50  # 201 targets with the separator at the end
    assert splits.manifest.files[0].split == "both"


def test_eval_source_is_taken_out_of_training(tmp_path):
    root = directory(tmp_path)
    splits = load(tmp_path, source=str(root), eval_source=str(root / "deep"))
    assert len(splits.validation.lengths) == 20
    assert len(splits.train.lengths) == 21
    assert b"<001>" not in text(splits.train)


def arrays(tmp_path):
    ids = np.random.default_rng(0).integers(1, 1000, 500).astype(np.uint16)
    ids[[100, 230, 470]] = 0
    np.save(tmp_path / "a.npy", ids[:300])
    ids[300:].tofile(tmp_path / "b.bin")
    return ids


def test_token_arrays_are_memory_mapped(tmp_path):
    ids = arrays(tmp_path)
    splits = load(tmp_path, source=str(tmp_path / "[ab].*"), vocab_size=1000, eval_fraction=0.2)
    assert all(isinstance(s, np.memmap) for s in splits.train.shards)
    assert splits.manifest is None
    tokens, targets, _ = (np.concatenate(p) for p in zip(splits.train.pairs(), splits.validation.pairs()))
    np.testing.assert_array_equal(tokens, np.delete(ids, [299, 499]))
    np.testing.assert_array_equal(targets, np.delete(ids, [0, 300]))
    assert splits.validation.targets == int(498 * 0.2)


def test_separator_id_makes_documents_of_token_arrays(tmp_path):
    arrays(tmp_path)
    splits = load(
        tmp_path, source=str(tmp_path / "a.npy"), vocab_size=1000, separator_id=0, eval_fraction=0.1
    )
    np.testing.assert_array_equal(splits.train.starts, [0, 100, 230])
    np.testing.assert_array_equal(splits.train.lengths, [100, 130, 299 - 29 - 230])


def test_a_byte_corpus_can_be_kept_as_a_token_array(tmp_path):
    corpus = Corpus.from_documents([b"abc", b"de"])
    np.save(tmp_path / "kept.npy", corpus.shards[0])
    array = np.load(tmp_path / "kept.npy", mmap_mode="r")
    for one, two in zip(Corpus.from_arrays([array], separator_id=256).pairs(), corpus.pairs()):
        np.testing.assert_array_equal(one, two)


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"task\.source='/no/such'.*'stdlib'"):
        load(tmp_path, source="/no/such")
    with pytest.raises(FileNotFoundError, match=r"task\.source.*no file"):
        load(tmp_path, source=str(tmp_path / "*.txt"))
    with pytest.raises(FileNotFoundError, match=r"task\.eval_source='/no/such'"):
        load(tmp_path, eval_source="/no/such")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="training side is empty"):
        load(tmp_path, source=str(tmp_path / "empty"))
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"validation side is empty.*eval_fraction=0\.05"):
        load(tmp_path, source=str(tmp_path / "short"))
    with pytest.raises(ValueError, match=r"task\.eval_fraction.*0\.0"):
        load(tmp_path, eval_fraction=0.0)


def test_unusable_token_arrays(tmp_path):
    arrays(tmp_path)
    with pytest.raises(ValueError, match=r"set task\.vocab_size"):
        load(tmp_path, source=str(tmp_path / "a.npy"))
    with pytest.raises(ValueError, match=r"a\.npy holds token ids .*task\.vocab_size=10 allows 0\.\.9"):
        load(tmp_path, source=str(tmp_path / "a.npy"), vocab_size=10)
    with pytest.raises(ValueError, match=r"b\.bin has 400 bytes, no multiple"):
        load(tmp_path, source=str(tmp_path / "b.bin"), vocab_size=1000, token_dtype="V3")
    np.save(tmp_path / "float.npy", np.zeros(10))
    with pytest.raises(ValueError, match=r"float\.npy holds float64"):
        load(tmp_path, source=str(tmp_path / "float.npy"), vocab_size=1000)
    (tmp_path / "x.txt").write_bytes(b"text")
    with pytest.raises(ValueError, match="mixes token arrays"):
        load(tmp_path, source=str(tmp_path), vocab_size=1000)
    with pytest.raises(ValueError, match="must be of one kind"):
        load(tmp_path, source=str(tmp_path / "x.txt"), eval_source=str(tmp_path / "a.npy"), vocab_size=1000)


def test_cache_is_written_whole_or_not_at_all(tmp_path, caplog):
    write_cache(str(tmp_path), "x.json", {"a": 1})
    write_cache(str(tmp_path), "x.json", {"a": 2})
    assert read_cache(str(tmp_path), "x.json") == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert read_cache(str(tmp_path), "y.json") is None
    (tmp_path / "file").write_text("")
    write_cache(str(tmp_path / "file"), "x.json", {})
    assert "task.cache_dir" in caplog.text
