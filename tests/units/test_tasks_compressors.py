"""N-gram and xz references against small computations by hand."""

import lzma
import math

import numpy as np
import pytest

from tasks.compressors import ngram_bits_per_byte, reference_bits_per_byte, xz_bits_per_byte
from tasks.corpus import Corpus
from tasks.manifest import FileEntry, Manifest


def witten_bell(documents, history, symbol, order):
    """P_k(symbol | history) by definition, with counts gathered by looking through the documents."""
    if order < 0:
        return 1 / 257
    context = tuple(history[len(history) - order :])
    followers = []
    for document in documents:
        sequence = [256] * order + list(document) + [256]
        for i in range(len(sequence) - order):
            if tuple(sequence[i : i + order]) == context:
                followers.append(sequence[i + order])
    lower = witten_bell(documents, history, symbol, order - 1)
    if not followers:
        return lower
    distinct = len(set(followers))
    return (followers.count(symbol) + distinct * lower) / (len(followers) + distinct)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_ngrams_equal_their_definition(order):
    train, held_out = [b"abracadabra", b"abc", b"bacab"], [b"abrac", b"zab"]
    bits = 0.0
    for document in held_out:
        history = [256] * 3
        for symbol in [*document, 256]:
            bits -= math.log2(witten_bell(train, history, symbol, order))
            history.append(symbol)
    expected = bits / sum(map(len, held_out))
    measured = ngram_bits_per_byte(Corpus.from_documents(train), Corpus.from_documents(held_out), (order,))
    assert measured[order] == pytest.approx(expected, rel=1e-12)


def test_one_symbol_by_hand():
    # After "a" training saw "a" twice and the end once: N = 3, T = 2; order 0 saw a, a, a, end: N = 4, T = 2.
    train, held_out = Corpus.from_documents([b"aaa"]), Corpus.from_documents([b"a"])
    start0, end0 = (3 + 2 / 257) / 6, (1 + 2 / 257) / 6
    start1, end1 = (1 + 1 * start0) / 2, (1 + 2 * end0) / 5
    measured = ngram_bits_per_byte(train, held_out, (0, 1))
    assert measured[0] == pytest.approx(-math.log2(start0 * end0))
    assert measured[1] == pytest.approx(-math.log2(start1 * end1))


def test_orders_are_checked():
    corpus = Corpus.from_documents([b"a"])
    with pytest.raises(ValueError, match=r"0\.\.6"):
        ngram_bits_per_byte(corpus, corpus, (7,))


def test_xz_and_the_cache(tmp_path):
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, 8, dtype=np.uint8).tobytes() for _ in range(300)]
    documents = [b" ".join(words[i] for i in rng.integers(0, 300, 400)) for _ in range(6)]
    train, held_out = Corpus.from_documents(documents[:5]), Corpus.from_documents(documents[5:])
    bits = xz_bits_per_byte(train, held_out)
    assert bits["xz"] == pytest.approx(8 * len(lzma.compress(documents[5], preset=9)) / len(documents[5]))
    assert bits["xz_primed"] < 0.8 * bits["xz"]
    manifest = Manifest("here", {}, (FileEntry("a", 1, "0", "train"),))
    first = reference_bits_per_byte(train, held_out, manifest, cache_dir=str(tmp_path))
    assert first.keys() == {"ngram_order_2", "ngram_order_3", "xz", "xz_primed"}
    assert len(list(tmp_path.iterdir())) == 1
    assert reference_bits_per_byte(train, held_out, manifest, cache_dir=str(tmp_path)) == first
